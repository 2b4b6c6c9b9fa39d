"""What every request passes before any route sees it: Host, bearer key, sizes, and JSON that can be read safely.

A pure ASGI middleware: it keeps no upload in memory, and hands on a JSON body that it has read to check.
"""

import hmac
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import MEDIA_TYPE, document_of, problem
from app.domain.errors import InvalidError, TooLargeError, VerituneError
from app.domain.reading import reject_forbidden
from app.settings import LOOPBACK, Settings

DEEPEST_JSON = 64
OPEN_PATHS = frozenset({"/health/live", "/health/ready"})


class Guard:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        extra = {name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()}
        self._any_host = settings.host not in LOOPBACK and not extra
        self._hosts = {*LOOPBACK, "[::1]", settings.host, *extra}
        self._key = settings.key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, refusal)
            return
        try:
            receive = await self._checked(scope, headers, receive)
        except VerituneError as error:
            await _refuse(send, document_of(error, scope["path"]))
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> dict[str, Any] | None:
        path: str = scope["path"]
        host = headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "[::1]"
        if not self._any_host and host.lower() not in self._hosts:
            detail = f"the Host {host[:60]!r} is not served here; add it to VERITUNE_ALLOWED_HOSTS"
            return problem(path, 400, "wrong_host", detail)
        if self._key is None or path in OPEN_PATHS:
            return None
        given = headers.get("authorization", "")
        wanted = f"Bearer {self._key.get_secret_value()}"
        if hmac.compare_digest(given.encode(), wanted.encode()):
            return None
        return problem(path, 401, "unauthorized", "send the key as: Authorization: Bearer …")

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """`receive`, bounded; for JSON, read and checked."""
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        length = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else None
        if kind == "multipart/form-data":
            return _bounded(receive, length, self._settings.max_upload_bytes)
        has_body = bool(length) or "transfer-encoding" in headers
        if scope["method"] != "POST" or not has_body:
            return receive
        if kind != "application/json" and not kind.endswith("+json"):
            raise InvalidError(
                f"the content type {kind[:60]!r} is not read here; send application/json, or a file as "
                "multipart/form-data",
                code="unsupported_media_type",
            )
        body = await _read(_bounded(receive, length, self._settings.max_json_bytes))
        _check_json(body)
        return _again(body, receive)


def _check_json(body: bytes) -> None:
    depth = deepest = 0
    in_string = escaped = False
    for byte in body:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in (0x5B, 0x7B):
            depth += 1
            deepest = max(deepest, depth)
        elif byte in (0x5D, 0x7D):
            depth -= 1
    if deepest > DEEPEST_JSON:
        raise InvalidError(f"the JSON is nested {deepest} deep; at most {DEEPEST_JSON} is read", code="too_deep")
    try:
        reject_forbidden(json.loads(body))
    except UnicodeDecodeError:
        raise InvalidError("the body is not UTF-8", code="bad_utf8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidError(f"the body is not JSON: {error.msg} at {where}", code="bad_json") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise InvalidError(f"the body is not JSON: {error}", code="bad_json") from None


def _bounded(receive: Receive, length: int | None, limit: int) -> Receive:
    """`receive` that raises TooLargeError as soon as more than `limit` bytes are sent, or announced."""
    message = f"the body is larger than {limit:,} bytes, which is this deployment's limit"
    if length is not None and length > limit:
        raise TooLargeError(message)
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        part = await receive()
        seen += len(part.get("body", b""))
        if seen > limit:
            raise TooLargeError(message)
        return part

    return counted


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        part = await receive()
        if part["type"] == "http.disconnect":
            raise InvalidError("the request ended before its body did", code="cut_off")
        body += part.get("body", b"")
        if not part.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then whatever follows (a disconnect)."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(send: Send, document: dict[str, Any]) -> None:
    status = document["status"] if document["code"] != "unsupported_media_type" else 415
    body = json.dumps(document | {"status": status}).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
