"""The exceptions that a user may see. `app.api.errors` maps them to HTTP status codes.

VerituneError
├── InvalidError        the request cannot be parsed, or is not allowed
│   ├── NotYetSupportedError
│   └── TooLargeError
├── NotFoundError
├── ConflictError       the request is valid, but the current state forbids it
├── BusyError           try again after `retry_after` seconds: a bounded queue is full
├── UnavailableError    try again after `retry_after` seconds: a service is down
│   └── StorageError    the blob store or a disk failed; code `disk`: full or not writable, the operator must act
├── ClientDisconnectedError   the client closed the connection
└── LeaseLostError      internal: an attempt wrote to a job whose lease it had lost
"""

from dataclasses import dataclass

Loc = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the input. `loc` is the path to it, such as ("trainer", "epochs")."""

    loc: Loc
    message: str
    hint: str | None = None


class VerituneError(Exception):
    """Base of all errors that a user may see. `code` is stable, for programs."""

    default_code = "error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        problems: tuple[Problem, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.default_code
        self.problems = problems
        self.retry_after = retry_after


class InvalidError(VerituneError):
    default_code = "invalid_request"


class NotYetSupportedError(InvalidError):
    default_code = "not_yet_supported"


class TooLargeError(InvalidError):
    default_code = "too_large"


class NotFoundError(VerituneError):
    default_code = "not_found"


class ConflictError(VerituneError):
    default_code = "conflict"


class BusyError(VerituneError):
    default_code = "busy"


class UnavailableError(VerituneError):
    default_code = "unavailable"


class StorageError(UnavailableError):
    default_code = "storage_away"


class ClientDisconnectedError(VerituneError):
    default_code = "cut_off"


class LeaseLostError(VerituneError):
    default_code = "lease_lost"
