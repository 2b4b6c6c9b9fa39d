"""Routes that refuse (415) a body of a content type they do not read, before any of it is read.

Without this a form posted to a JSON route would be gathered in memory as large as an upload may be.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

FORM = "multipart/form-data"


class TypedRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        takes_form = isinstance(self.body_field.field_info, Form)

        async def typed(request: Request) -> Response:
            if announces_body(request.headers):
                _check(media_type(request.headers), takes_form)
            return await handler(request)

        return typed


def _check(kind: str, takes_form: bool) -> None:
    if takes_form and kind != FORM:
        raise HTTPException(415, f"the content type {kind[:60]!r} is not read here; send the file as {FORM}")
    if not takes_form and not is_json(kind):
        raise HTTPException(415, f"the content type {kind[:60]!r} is not read here; send application/json")


def media_type(headers: Headers) -> str:
    """The content type without its parameters, in lower case; empty when there is none."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def announces_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
