"""What routes share: the services, paging, uploads, the idempotency key, pages of answers."""

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
    """A page of a list. Ask for the next with `after` = the id of the last item here, while `has_more`."""

    model_config = ConfigDict(frozen=True)

    data: list[Item]
    has_more: bool


async def services(request: Request) -> Services:
    # Not a plain `def`: FastAPI would send every request through a thread for it, and then through another.
    found: Services = request.app.state.services
    return found


async def raw_body(request: Request) -> bytes:
    return await request.body()


async def watch_disconnect(request: Request) -> AsyncIterator[IsCancelled]:
    """Whether the client has disconnected, while its request runs. The body has been read by then."""
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
AFTER = Query(description="Id (not name) of the last item of the page before. It need not exist any more.")
"""The cursor of a list that is paged by id: `Annotated[Annotated[str, IdOf(…)] | None, AFTER]`."""

Limit = Annotated[int, Query(ge=1, le=100, description="Items on a page.")]
Seq = Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last one earlier.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key and body give the first answer again, for a day. A stream takes no notice of it.",
    ),
]


class IdOf:
    """Metadata of a string that has to be spelled like an id with this prefix."""

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
    """A path parameter that refers to a resource by id or name; `example` is one that the demo leaves."""
    return Path(
        min_length=1,
        max_length=200,
        description=f"Id or name of the {what}.",
        openapi_examples={example: {"value": example, "summary": f"the {what} that `make demo` leaves"}},
    )


_WORDS = {
    404: "Not found",
    409: "The present state forbids it",
    429: "Busy; try again after `Retry-After` seconds",
    503: "A part is away; try again after `Retry-After` seconds",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for the errors of one route. `app.api.schema` adds those of every route."""
    return {status: problem_response(_WORDS[status]) for status in statuses}


def event_stream(data: dict[str, Any], event: dict[str, Any], **more: Any) -> dict[str, Any]:
    """OpenAPI content of a stream: the schema of one server-sent event, whose data is JSON of the schema `data`."""
    fields = {
        "event": {"type": "string", **event},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        **more,
    }
    return {"text/event-stream": {"schema": {"type": "object", "required": list(fields), "properties": fields}}}


def form_of(*known: str) -> Any:
    """A dependency that refuses form fields which are unknown, sent twice, or hold what no text here may hold."""

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
        return Problem((name,), f"the field holds {bad}", "remove it and send again")
    if name not in known:
        return Problem((name,), "there is no such field", did_you_mean(name, known))
    if name in earlier:
        return Problem((name,), "the field stands more than once", "send it once")
    if name == FILE and isinstance(value, str):
        return Problem((name,), "the field holds text where a file is expected", "with curl: -F file=@PATH")
    return None


@contextmanager
def on_disk(file: UploadFile, target: pathlib.Path) -> Iterator[pathlib.Path]:
    """The upload as a file of its own for as long as the block lasts, copied in constant memory.

    What the block finds wrong without saying where is wrong with the file.
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
