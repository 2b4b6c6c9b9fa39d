"""What every request passes before any route sees it: Host, origin, bearer key, sizes, JSON that can be read safely.

A pure ASGI middleware: it keeps no upload in memory, and hands on a JSON body that it has read to check. Which
content type a route takes is the route's own affair (`app.api.routing`).
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
CHECKED_AT_ONCE = 1 << 14
"""Bytes of JSON that are checked on the event loop; more are checked in a thread."""

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/docs", "/openapi.json"})
"""What needs no key: probes, and the documentation in which a key is typed. None of it tells what is stored here."""

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
        if not self._serves(host):
            detail = f"the Host {host[:60]!r} is not served here; add it to VERITUNE_ALLOWED_HOSTS"
            return problem(path, 400, "wrong_host", detail)
        if origin := foreign_origin(scope["method"], headers, self._allowed_origins):
            detail = (
                f"a page of {origin[:60]!r} sent this, and pages of other sites may change nothing here; "
                "add its host to VERITUNE_ALLOWED_HOSTS if it is yours"
            )
            return problem(path, 403, "foreign_origin", detail)
        if not self._knows(path, headers.get("authorization", "")):
            return problem(path, 401, "unauthorized", "send the key as: Authorization: Bearer …")
        for place, holds_nul in (("path", "\0" in path), ("query", b"%00" in scope["query_string"])):
            if holds_nul:
                detail = f"the {place} holds a NUL character"
                found = (Problem((place,), "holds a NUL character", "remove it and send again"),)
                return problem(path, 422, "forbidden_character", detail, found)
        return None

    def _serves(self, host: str) -> bool:
        if self._any_host:
            return True
        match = _HOST.fullmatch(host.lower())
        return match is not None and match.group(1).strip("[]") in self._hosts

    def _knows(self, path: str, given: str) -> bool:
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return True
        scheme, _, token = given.partition(" ")
        same = hmac.compare_digest(token.strip().encode(), self._key.get_secret_value().encode())
        return same and scheme.lower() == "bearer"

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """`receive`, bounded; for JSON, read and checked."""
        kind = media_type(headers)
        announced = headers.get("content-length", "")
        length = int(announced) if announced.isdecimal() else None
        if kind == "multipart/form-data":
            return _bounded(receive, length, self._settings.max_upload_bytes)
        receive = _bounded(receive, length, self._settings.max_json_bytes)
        if scope["method"] != "POST" or not is_json(kind) or not announces_body(headers):
            return receive
        body = await _read(receive)
        if len(body) > CHECKED_AT_ONCE:
            await run_in_threadpool(_check_json, body)
        else:
            _check_json(body)
        return _again(body, receive)


def _check_json(body: bytes) -> None:
    """Raises InvalidError unless `body` is UTF-8 JSON.

    It must not be too deep, name a key twice, or hold a character that no text here may hold.
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
        raise InvalidError("the body holds a number of more than 4,300 digits", code="bad_json") from None
    if _deeper_than(document, DEEPEST_JSON):
        raise _too_deep()
    if _ESCAPED_FORBIDDEN.search(text):  # in JSON such a character can only stand escaped
        reject_forbidden(document)


def _deeper_than(document: Any, most: int) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(most):
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


def _bounded(receive: Receive, length: int | None, limit: int) -> Receive:
    """`receive` that raises as soon as more than `limit` bytes are sent, or announced.

    It raises an HTTPException: that is the one error which FastAPI lets through while it reads a form.
    """
    refusal = HTTPException(413, f"the body is larger than {limit:,} bytes, which is this deployment's limit")
    if length is not None and length > limit:
        raise refusal
    received = 0

    async def counted() -> Message:
        nonlocal received
        part = await receive()
        received += len(part.get("body", b""))
        if received > limit:
            raise refusal
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
    body = json.dumps(document).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    if document["status"] == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": document["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})
