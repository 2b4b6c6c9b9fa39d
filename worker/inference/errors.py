"""What serving raises. Every message is for the client or the operator, and names no path of this machine."""

from typing import Any

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """An error response: HTTP status, message, the field at fault, and the seconds after which to retry."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        fallback = "InternalServerError" if self.status >= 500 else "BadRequestError"
        kind = ERROR_TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class ClientDisconnected(Exception):
    """The client closed its connection before the response was ready."""


class EngineUnavailable(Exception):
    """No engine is ready; `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ModelNotFound(Exception):
    """No adapter and no served base has this digest."""


class ModelError(Exception):
    """A served model cannot be used as it is; the message gives the reason."""


class OutOfMemory(Exception):
    """A served model does not fit now. It fits once running requests have finished."""


class RequestError(Exception):
    """The engine cannot answer this request; `status` is the HTTP status, `param` the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


class SamplingError(Exception):
    """No token can be chosen. `status` is 400 if the request is at fault, 500 if the model is."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class GrammarError(Exception):
    """A grammar is invalid, or too expensive to follow."""


class LoraError(Exception):
    """The weights are not those of a LoRA adapter over this base; the message gives the reason."""
