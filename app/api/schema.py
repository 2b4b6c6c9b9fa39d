"""The OpenAPI document: FastAPI derives it from the routes; the errors that all routes share are added here."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app.api.cross_site import SAFE_METHODS
from app.api.errors import problem_response

_COMMON = {
    "400": "The request is cut off or malformed, or its `Host` is not served",
    "422": "The input is invalid; `errors` names each place",
    "default": "Any other error",
}
_WITH_BODY = {
    "413": "The body is larger than this deployment's limit",
    "415": "The route does not read this content type",
}
_CHANGES = {"403": "A page of another site sent the request (`Origin`, `Sec-Fetch-Site`)"}
_PROBES = "/health/"


def operation_id(route: APIRoute) -> str:
    """The route function's name, such as `list_jobs`. Generated clients name their methods after it."""
    return str(route.name)


class DocumentedApp(FastAPI):
    """The FastAPI application. `keyed`: whether requests need a bearer key."""

    def __init__(self, *, keyed: bool, **arguments: Any) -> None:
        super().__init__(generate_unique_id_function=operation_id, **arguments)
        self._keyed = keyed

    def openapi(self) -> dict[str, Any]:
        known = self.openapi_schema
        document = super().openapi()
        if known is None:
            _complete(document, keyed=self._keyed)
        return document


def _complete(document: dict[str, Any], *, keyed: bool) -> None:
    components = document["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    if keyed:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"bearer": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _document_errors(method, operation, keyed=keyed and not path.startswith(_PROBES))
            if keyed and path.startswith(_PROBES):
                operation["security"] = []


def _document_errors(method: str, operation: dict[str, Any], *, keyed: bool) -> None:
    responses = operation["responses"]
    wanted = dict(_COMMON)
    if method.upper() not in SAFE_METHODS:
        wanted |= _CHANGES
    if keyed:
        wanted["401"] = "The bearer key is missing or wrong"
    if "requestBody" in operation:
        wanted |= _WITH_BODY
    responses |= {status: problem_response(words) for status, words in wanted.items()}
