"""Routes that refuse unknown or repeated query parameters (422) and wrong content types (415).

The check comes before the body is read. Otherwise a form that is posted to a JSON route would be buffered in memory, up
to the size limit of uploads.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Form, Query
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException

from app.domain.errors import InvalidError, Problem
from app.domain.spec_parser import build_headline
from app.domain.spelling import did_you_mean

FORM = "multipart/form-data"


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        parameters = [field.alias for field in get_flat_params(self.dependant) if isinstance(field.field_info, Query)]
        body = self.body_field
        takes_form = body is not None and isinstance(body.field_info, Form)

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                _check_query(request.query_params, parameters)
            if body is not None and announces_body(request.headers):
                _check_content_type(media_type(request.headers), takes_form)
            return await handler(request)

        return strict


def _check_query(query: QueryParams, known: list[str]) -> None:
    names = [name for name, _value in query.multi_items()]
    unknown = [_unknown_parameter(name, known) for name in dict.fromkeys(names) if name not in known]
    repeated = [
        Problem(("query", name), "the query parameter is given more than once", "give it once")
        for name in known
        if names.count(name) > 1
    ]
    if found := (*unknown, *repeated):
        raise InvalidError(build_headline(found), code="invalid_request", problems=found)


def _unknown_parameter(name: str, known: list[str]) -> Problem:
    hint = did_you_mean(name, known) or "the route takes no query parameters; leave it out"
    return Problem(("query", name), f"there is no query parameter {name[:60]!r} on this route", hint)


def _check_content_type(kind: str, takes_form: bool) -> None:
    if takes_form and kind != FORM:
        raise HTTPException(415, f"this route does not read the content type {kind[:60]!r}; send the file as {FORM}")
    if not takes_form and not is_json(kind):
        raise HTTPException(415, f"this route does not read the content type {kind[:60]!r}; send application/json")


def media_type(headers: Headers) -> str:
    """The content type without its parameters, in lower case; empty when there is none."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def announces_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
