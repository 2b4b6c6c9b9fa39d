"""Turns errors into `application/problem+json` (RFC 9457), never into a stack trace or an HTML page."""

import traceback
from dataclasses import replace
from http import HTTPStatus
from math import ceil
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.domain.errors import (
    BusyError,
    ClientDisconnectedError,
    ConflictError,
    InvalidError,
    NotFoundError,
    Problem,
    TooLargeError,
    UnavailableError,
    VerituneError,
)
from app.domain.spec_parser import list_problems

MEDIA_TYPE = "application/problem+json"
MOST_PROBLEMS = 100
LONGEST_TEXT = 1_000
LONGEST_LOC_PART = 100
log = structlog.get_logger(__name__)

STATUS: tuple[tuple[type[VerituneError], int], ...] = (
    (TooLargeError, 413),
    (InvalidError, 422),
    (NotFoundError, 404),
    (ConflictError, 409),
    (BusyError, 429),
    (UnavailableError, 503),
    (ClientDisconnectedError, 400),
)


class ProblemError(BaseModel):
    """One error in the input. `loc` is its path in the document."""

    model_config = ConfigDict(frozen=True)

    loc: list[str | int]
    message: str
    hint: str | None = None


class ProblemDocument(BaseModel):
    """The body of every error response. Programs test `code`, which is stable; people read `detail`."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:veritune:problem:invalid_spec",
                    "title": "Unprocessable Entity",
                    "status": 422,
                    "detail": "trainer.epoch: there is no key 'epoch' here; did you mean 'epochs'?",
                    "instance": "/jobs",
                    "code": "invalid_spec",
                    "errors": [
                        {
                            "loc": ["trainer", "epoch"],
                            "message": "there is no key 'epoch' here",
                            "hint": "did you mean 'epochs'?",
                        }
                    ],
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    errors: list[ProblemError] = []


def status_of(error: VerituneError) -> int:
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def problem(instance: str, status: int, code: str, detail: str, found: tuple[Problem, ...] = ()) -> dict[str, Any]:
    """Build the document, as JSON types. Quoted input is cut to a readable length."""
    return {
        "type": f"urn:veritune:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _printable(detail),
        "instance": _printable(instance),
        "code": code,
        "errors": [_entry(one) for one in found[:MOST_PROBLEMS]],
    }


def _entry(found: Problem) -> dict[str, Any]:
    loc = [part if isinstance(part, int) else _printable(part, LONGEST_LOC_PART) for part in found.loc]
    hint = None if found.hint is None else _printable(found.hint)
    return {"loc": loc, "message": _printable(found.message), "hint": hint}


def _printable(text: str, max_length: int = LONGEST_TEXT) -> str:
    """Cut `text`, and replace characters that cannot be encoded: a lone surrogate must not break the response."""
    plain = text.encode("utf-8", "replace").decode()
    return plain if len(plain) <= max_length else f"{plain[: max_length - 1]}…"


def unexpected(error: Exception, instance: str) -> dict[str, Any]:
    """Log an error of ours with its trace, and return a document without details. The trace shows no values."""
    log.error("unexpected_error", path=instance, exception="".join(traceback.format_exception(error)))
    return problem(instance, 500, "internal_error", "the service failed unexpectedly; its log has the details")


def problem_response(description: str) -> dict[str, Any]:
    """An OpenAPI response with a problem document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    return {"description": description, "content": content}


def document_of(error: VerituneError, instance: str) -> dict[str, Any]:
    return problem(instance, status_of(error), error.code, error.detail, error.problems)


def _answer(document: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(document, document["status"], headers, MEDIA_TYPE)


def response_of(error: VerituneError, instance: str) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, ceil(error.retry_after)))}
    return _answer(document_of(error, instance), headers)


async def _on_veritune(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, VerituneError)
    return response_of(error, request.url.path)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    """A `loc` in the body is relative to the body. Any other begins with path, query or header."""
    assert isinstance(error, RequestValidationError)
    body = dict(error.body) if isinstance(error.body, FormData) else error.body
    sent = {"body": body, "query": dict(request.query_params), "path": request.path_params, "header": {}}
    found = tuple(
        replace(one, loc=one.loc[1:]) if one.loc[0] == "body" else one
        for one in list_problems(error.errors(), sent, _body_model(request))
    )
    first = found[0]
    place = ".".join(str(part) for part in first.loc) or "the body"
    hint = f"; {first.hint}" if first.hint else ""
    return _answer(problem(request.url.path, 422, "invalid_request", f"{place}: {first.message}{hint}", found))


def _body_model(request: Request) -> type[BaseModel] | None:
    """The model that the route reads its body as, if it has one."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route; GET /docs lists them", 405: "this route does not accept that method"}
    codes = {400: "bad_body", 404: "no_route", 405: "wrong_method", 413: "too_large", 415: "unsupported_media_type"}
    status = error.status_code
    detail = words.get(status, str(error.detail))
    document = problem(request.url.path, status, codes.get(status, "http_error"), detail)
    headers = dict(error.headers or {})
    return _answer(document, headers | _allowed(request) if status == 405 else headers)


def _allowed(request: Request) -> dict[str, str]:
    """The Allow header. It lists the methods of all routes with this path, since each route knows only its own."""
    path = getattr(request.scope.get("route"), "path", "")
    operations = request.app.openapi()["paths"].get(path, {})
    methods = {method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set())
    return {"Allow": ", ".join(sorted(methods))} if methods else {}


async def _on_disconnect(request: Request, _error: Exception) -> JSONResponse:
    return _answer(problem(request.url.path, 400, "cut_off", "the request ended before its body did"))


async def _on_anything(request: Request, error: Exception) -> JSONResponse:
    return _answer(unexpected(error, request.url.path))


def install(app: FastAPI) -> None:
    app.add_exception_handler(VerituneError, _on_veritune)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_anything)
