"""Errors → `application/problem+json` (RFC 9457). Never a stack trace, never an HTML page."""

from http import HTTPStatus
from math import ceil
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.domain.errors import (
    BusyError,
    ConflictError,
    InvalidError,
    NotFoundError,
    Problem,
    TooLargeError,
    UnavailableError,
    VerituneError,
)

MEDIA_TYPE = "application/problem+json"
log = structlog.get_logger(__name__)

STATUS: tuple[tuple[type[VerituneError], int], ...] = (
    (TooLargeError, 413),
    (InvalidError, 422),
    (NotFoundError, 404),
    (ConflictError, 409),
    (BusyError, 429),
    (UnavailableError, 503),
)


class ProblemError(BaseModel):
    """One thing wrong at one place of the input."""

    model_config = ConfigDict(frozen=True)

    loc: list[str | int]
    message: str
    hint: str | None = None


class ProblemDocument(BaseModel):
    """What every error looks like. `code` is stable; `detail` is for people."""

    model_config = ConfigDict(frozen=True)

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
    """The document, as JSON types."""
    return {
        "type": f"urn:veritune:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "errors": [{"loc": list(p.loc), "message": p.message, "hint": p.hint} for p in found[:100]],
    }


def document_of(error: VerituneError, instance: str) -> dict[str, Any]:
    return problem(instance, status_of(error), error.code, error.detail, error.problems)


def _answer(document: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(document, document["status"], headers, MEDIA_TYPE)


def response_of(error: VerituneError, instance: str) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, ceil(error.retry_after)))}
    return _answer(document_of(error, instance), headers)


def _plain(text: str) -> str:
    """`text` without what cannot be encoded: a lone surrogate in a given value must not break the answer."""
    return text.encode("utf-8", "replace").decode()


async def _on_veritune(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, VerituneError)
    return response_of(error, request.url.path)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    found = tuple(
        Problem(tuple(item["loc"]), _plain(str(item["msg"]).removeprefix("Value error, "))) for item in error.errors()
    )
    first = found[0]
    place = ".".join(str(part) for part in first.loc)
    detail = _plain(f"{place}: {first.message}")
    return _answer(problem(request.url.path, 422, "invalid_request", detail, found))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route; GET /docs lists them", 405: "this route does not take that method"}
    codes = {404: "no_route", 405: "wrong_method", 401: "unauthorized", 413: "too_large"}
    status = error.status_code
    detail = words.get(status, str(error.detail))
    document = problem(request.url.path, status, codes.get(status, "http_error"), detail)
    return _answer(document, dict(error.headers or {}))


async def _on_disconnect(request: Request, _error: Exception) -> JSONResponse:
    return _answer(problem(request.url.path, 400, "cut_off", "the request ended before its body did"))


async def _on_anything(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    detail = "something went wrong on our side; the log has the details"
    return _answer(problem(request.url.path, 500, "internal_error", detail))


def install(app: FastAPI) -> None:
    app.add_exception_handler(VerituneError, _on_veritune)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_anything)
