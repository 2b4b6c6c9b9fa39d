"""Checks every request before it reaches a route: Host, origin, bearer key, size, and whether JSON is safe to parse.

It is a pure ASGI middleware. It does not buffer uploads. It reads a JSON body to check it, and passes it on.
`app.api.routing` checks the content type, which depends on the route.
"""

import hmac
import json
import re
from typing import Any

from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.cross_site import foreign_origin
from app.api.errors import MEDIA_TYPE, document_of, problem
from app.api.routing import announces_body, is_json, media_type
from app.domain.errors import InvalidError, Problem, VerituneError
from app.domain.spec_parser import build_headline, reject_forbidden
from app.domain.strict_json import RepeatedKeyError, parse_json
from app.settings import LOOPBACK, Settings

DEEPEST_JSON = 64
CHECKED_ON_LOOP_BYTES = 1 << 14
"""A JSON body up to this size is checked on the event loop, a larger one in a thread."""

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/docs", "/openapi.json"})
"""Paths that need no key: probes, and the documentation in which a user types the key. They expose no stored data."""

OPEN_FOLDER = "/static/swagger/"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::\d*)?")
_ESCAPED_FORBIDDEN = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class Guard:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        extra = {name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()}
        self._any_host = settings.host not in LOOPBACK and not extra
        self._hosts = {*LOOPBACK, settings.host.lower(), *extra}
        self._allowed_origins = extra
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
        except HTTPException as error:
            await _refuse(send, problem(scope["path"], error.status_code, "too_large", str(error.detail)))
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> dict[str, Any] | None:
        path: str = scope["path"]
        host = headers.get("host", "")
        if not self._serves_host(host):
            detail = f"the Host {host[:60]!r} is not served here; add it to VERITUNE_ALLOWED_HOSTS"
            return problem(path, 400, "wrong_host", detail)
        if origin := foreign_origin(scope["method"], headers, self._allowed_origins):
            detail = (
                f"a page of {origin[:60]!r} sent this request; pages of other sites may change nothing here; "
                "add its host to VERITUNE_ALLOWED_HOSTS if it is yours"
            )
            return problem(path, 403, "foreign_origin", detail)
        if not self._is_authorized(path, headers.get("authorization", "")):
            return problem(path, 401, "unauthorized", "send the key as: Authorization: Bearer …")
        for part, has_nul in (("path", "\0" in path), ("query", b"%00" in scope["query_string"])):
            if has_nul:
                detail = f"the {part} contains a NUL character"
                found = (Problem((part,), "contains a NUL character", "remove it and send again"),)
                return problem(path, 422, "forbidden_character", detail, found)
        return None

    def _serves_host(self, host: str) -> bool:
        if self._any_host:
            return True
        match = _HOST.fullmatch(host.lower())
        return match is not None and match.group(1).strip("[]") in self._hosts

    def _is_authorized(self, path: str, given: str) -> bool:
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return True
        scheme, _, token = given.partition(" ")
        same = hmac.compare_digest(token.strip().encode(), self._key.get_secret_value().encode())
        return same and scheme.lower() == "bearer"

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Return `receive` with a size limit. A JSON body is read and checked first."""
        kind = media_type(headers)
        announced = headers.get("content-length", "")
        length = int(announced) if announced.isdecimal() else None
        if kind == "multipart/form-data":
            return _limit_size(receive, length, self._settings.max_upload_bytes)
        receive = _limit_size(receive, length, self._settings.max_json_bytes)
        if scope["method"] != "POST" or not is_json(kind) or not announces_body(headers):
            return receive
        body = await _read_body(receive)
        if len(body) > CHECKED_ON_LOOP_BYTES:
            await run_in_threadpool(_check_json, body)
        else:
            _check_json(body)
        return _replay(body, receive)


def _check_json(body: bytes) -> None:
    """Check that `body` is UTF-8 JSON: not too deep, with no repeated key and no forbidden character.

    Raises InvalidError.
    """
    try:
        text = body.decode()
        document = parse_json(text)
    except UnicodeDecodeError as error:
        raise InvalidError(f"the body is not UTF-8 at byte {error.start + 1}", code="bad_utf8") from None
    except RepeatedKeyError as error:
        found = error.problem()
        raise InvalidError(build_headline((found,)), code="repeated_key", problems=(found,)) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidError(f"the body is not JSON: {error.msg} at {where}", code="bad_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # more digits than Python turns into an integer
        raise InvalidError("the body contains a number of more than 4,300 digits", code="bad_json") from None
    if _deeper_than(document, DEEPEST_JSON):
        raise _too_deep()
    if _ESCAPED_FORBIDDEN.search(text):  # JSON allows these characters only as escapes
        reject_forbidden(document)


def _deeper_than(document: Any, max_depth: int) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(max_depth):
        if not level:
            return False
        level = [
            member
            for item in level
            for member in (item.values() if isinstance(item, dict) else item)
            if isinstance(member, dict | list)
        ]
    return bool(level)


def _too_deep() -> InvalidError:
    return InvalidError(f"the JSON is nested more than {DEEPEST_JSON} deep", code="too_deep")


def _limit_size(receive: Receive, length: int | None, limit: int) -> Receive:
    """Return a `receive` that raises once the client sends, or announces, more than `limit` bytes.

    It raises HTTPException, the only error that FastAPI passes on while it reads a form.
    """
    refusal = HTTPException(413, f"the body is larger than {limit:,} bytes, which is this deployment's limit")
    if length is not None and length > limit:
        raise refusal
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise refusal
        return message

    return counted


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidError("the request ended before its body did", code="cut_off")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives the body that was read, and then the next message (a disconnect)."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(send: Send, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    if document["status"] == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": document["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})
