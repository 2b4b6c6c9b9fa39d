"""Dependencies that routes share: services, pages, uploads, the idempotency key."""

import asyncio
import pathlib
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Header, Path, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function
from starlette.datastructures import UploadFile as StarletteUpload

from app.api.errors import problem_response
from app.asgi import wait_for_disconnect
from app.composition import Services
from app.domain.claims import forbidden_character
from app.domain.errors import InvalidError, Problem
from app.domain.identity import id_pattern
from app.domain.spelling import did_you_mean
from app.services.prompt_session import IsCancelled

Item = TypeVar("Item")
FILE = "file"


class Page(BaseModel, Generic[Item]):
    """A page of a list. While `has_more` is true, send the id of its last item as `after` to get the next page."""

    model_config = ConfigDict(frozen=True)

    data: list[Item]
    has_more: bool


async def services(request: Request) -> Services:
    # Asynchronous, because FastAPI runs a plain `def` in a thread, which costs every request a thread switch.
    found: Services = request.app.state.services
    return found


async def raw_body(request: Request) -> bytes:
    return await request.body()


async def watch_disconnect(request: Request) -> AsyncIterator[IsCancelled]:
    """Yield a function that says whether the client has disconnected. The body must have been read already."""
    disconnected = asyncio.Event()

    async def watch() -> None:
        await wait_for_disconnect(request.receive)
        disconnected.set()

    watching = asyncio.create_task(watch())
    try:
        yield disconnected.is_set
    finally:
        watching.cancel()


ServicesDep = Annotated[Services, Depends(services)]
RawBody = Annotated[bytes, Depends(raw_body)]
CancelledByDisconnect = Annotated[IsCancelled, Depends(watch_disconnect)]
AFTER = Query(description="Id (not name) of the last item of the page before. The item may have been deleted.")
"""The cursor of a list that is paged by id: `Annotated[Annotated[str, IdOf(…)] | None, AFTER]`."""

Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of items on a page.")]
Seq = Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last item of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="For a day, the same key and body return the first response again. A stream ignores it.",
    ),
]


class IdOf:
    """Annotates a string that must have the form of an id with this prefix."""

    def __init__(self, prefix: str, resource: str) -> None:
        self._pattern = id_pattern(prefix)
        self._resource = resource

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"pattern": self._pattern}

    def _check(self, given: str) -> str:
        if re.fullmatch(self._pattern, given) is None:
            raise ValueError(
                f"{given[:60]!r} is not the id of {self._resource}; send the `id` of the last item you have"
            )
        return given


def named(what: str, example: str = "demo") -> Any:
    """A path parameter that refers to a resource by id or name. `example` names one that the demo creates."""
    return Path(
        min_length=1,
        max_length=200,
        description=f"Id or name of the {what}.",
        openapi_examples={example: {"value": example, "summary": f"the {what} that `make demo` creates"}},
    )


_WORDS = {
    404: "Not found",
    409: "The resource's state does not allow it",
    429: "Busy; try again after `Retry-After` seconds",
    503: "A part of the service is unavailable; try again after `Retry-After` seconds",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for the errors of one route. `app.api.schema` adds the errors that all routes share."""
    return {status: problem_response(_WORDS[status]) for status in statuses}


def event_stream(data: dict[str, Any], event: dict[str, Any], **more: Any) -> dict[str, Any]:
    """OpenAPI content of a stream: the schema of one server-sent event. Its data is JSON of the schema `data`."""
    fields = {
        "event": {"type": "string", **event},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        **more,
    }
    return {"text/event-stream": {"schema": {"type": "object", "required": list(fields), "properties": fields}}}


def form_of(*known: str) -> Any:
    """A dependency that refuses form fields that are unknown, repeated, or contain a forbidden character."""

    async def check(request: Request) -> None:
        earlier: set[str] = set()
        for name, value in (await request.form()).multi_items():
            found = _wrong_field(name, value, known, earlier)
            if found is not None:
                raise InvalidError(f"{found.loc[0]}: {found.message}", code="bad_form", problems=(found,))
            earlier.add(name)

    return Depends(check)


def _wrong_field(
    name: str, value: "str | StarletteUpload", known: tuple[str, ...], earlier: set[str]
) -> Problem | None:
    text = value if isinstance(value, str) else value.filename or ""
    if bad := forbidden_character(name) or forbidden_character(text):
        return Problem((name,), f"the field contains {bad}", "remove it and send again")
    if name not in known:
        return Problem((name,), "there is no such form field", did_you_mean(name, known))
    if name in earlier:
        return Problem((name,), "the field is given more than once", "give it once")
    if name == FILE and isinstance(value, str):
        return Problem((name,), "the field contains text where a file is expected", "with curl: -F file=@PATH")
    return None


@contextmanager
def on_disk(file: UploadFile, target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Copy the upload to `target`, in constant memory, and delete it when the block ends.

    An InvalidError of the block that names no place gets the form field of the file as its place.
    """
    try:
        with target.open("wb") as out:
            shutil.copyfileobj(file.file, out, 1 << 20)
        yield target
    except InvalidError as error:
        error.problems = error.problems or (Problem((FILE,), error.detail),)
        raise
    finally:
        target.unlink(missing_ok=True)
