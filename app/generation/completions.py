"""Client of OpenAI's completions protocol with vLLM's extensions. It works with our inference server and with vLLM."""

import socket
from typing import Any

import httpx
from pydantic import SecretStr

from app.domain.errors import BusyError, InvalidError, NotFoundError, UnavailableError
from app.generation.base import GenerationRequest, GenerationResult
from app.generation.transport import ExclusiveTransport, SocketOption

TIMEOUT = httpx.Timeout(900.0, connect=3.0)
"""Much longer than one Thought takes on a loaded machine.

A server that dies closes its connections, and the inference server answers 503 if its engine dies. Only a host that
vanishes sends nothing; TCP keepalive detects that.
"""

IDLE_SECONDS = 2.0
"""An idle connection is reused for so long.

uvicorn, also in vLLM, closes an idle connection after 5 s. A request that is sent at that moment gets no response.
"""

KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A host that acknowledges nothing for 40 s counts as dead. Options that the system does not have are left out."""


class CompletionsGenerator:
    """A client of the server at `url`. It is thread-safe: concurrent requests use different connections."""

    def __init__(self, url: str, secret: SecretStr | None = None, connections: int = 64) -> None:
        headers = {"Authorization": f"Bearer {secret.get_secret_value()}"} if secret else {}
        transport = ExclusiveTransport(connections, IDLE_SECONDS, _list_keepalive_options())
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=TIMEOUT, transport=transport, trust_env=False
        )

    def generate(self, request: GenerationRequest) -> GenerationResult:
        try:
            response = self._client.post("/v1/completions", json=_build_body(request))
        except httpx.TransportError as error:
            raise _build_unavailable(error) from error
        _raise_for(response)
        try:
            return _read_response(response.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:  # pydantic's errors are ValueErrors
            raise UnavailableError(
                "the inference server's response does not follow vLLM's completions protocol",
                code="inference_not_understood",
            ) from error

    def check(self) -> None:
        try:
            response = self._client.get("/health", timeout=2.0)
        except httpx.TransportError as error:
            raise _build_unavailable(error) from error
        _raise_for(response)

    def close(self) -> None:
        self._client.close()


def _list_keepalive_options() -> list[SocketOption]:
    known = [(getattr(socket, name), value) for name, value in KEEPALIVE.items() if hasattr(socket, name)]
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, option, value) for option, value in known),
    ]


def _build_body(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "prompt": list(request.prompt),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "return_token_ids": True,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if request.regex is not None:
        body["structured_outputs"] = {"regex": request.regex}
    if request.allowed_token_ids is not None:
        body["allowed_token_ids"] = list(request.allowed_token_ids)
    if request.logprobs is not None:
        body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    return body


def _build_unavailable(error: httpx.TransportError) -> UnavailableError:
    what = f"the inference server does not answer ({type(error).__name__})"
    return UnavailableError(what, code="inference_away", retry_after=2)


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    detail = _read_error_message(response)
    given = response.headers.get("Retry-After", "")
    after = float(given) if given.isdecimal() else 2.0  # a proxy may send a date
    match response.status_code:
        case 429:
            raise BusyError(detail, code="inference_busy", retry_after=after)
        case 404:
            raise NotFoundError(detail, code="unknown_model")
        case 401 | 403:
            raise UnavailableError("the inference server refuses this API's secret", code="inference_secret")
        case status if status >= 500:
            raise UnavailableError(detail, code="inference_away", retry_after=after)
        case _:
            raise InvalidError(detail, code="inference_refused")


def _read_error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the inference server answered {response.status_code}"


def _read_response(answer: dict[str, Any]) -> GenerationResult:
    choice = answer["choices"][0]
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return GenerationResult(
        ids=tuple(choice["token_ids"]),
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        first_logprobs=_read_first_logprobs(choice.get("logprobs")),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens") or 0,
    )


def _read_first_logprobs(logprobs: dict[str, Any] | None) -> dict[int, float]:
    """Token id → log probability, for the first token. The response's keys have the form `token_id:123`."""
    if not logprobs or not logprobs.get("top_logprobs"):
        return {}
    return {int(key.removeprefix("token_id:")): value for key, value in logprobs["top_logprobs"][0].items()}
