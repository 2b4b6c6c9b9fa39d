"""What routes share: the services, paging, uploads, the idempotency key, pages of answers."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Header, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict

from app.api.errors import ProblemDocument
from app.composition import Services

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A page of a list. Ask for the next with `after` = the id of the last item here, while `has_more`."""

    model_config = ConfigDict(frozen=True)

    data: list[Item]
    has_more: bool


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def raw_body(request: Request) -> bytes:
    return await request.body()


ServicesDep = Annotated[Services, Depends(services)]
RawBody = Annotated[bytes, Depends(raw_body)]
After = Annotated[str | None, Query(max_length=100, description="Id of the last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Items on a page.")]
Reference = Annotated[str, "An id or a name."]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key and body give the first answer again."),
]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for the errors that a route may give, beside 422."""
    words = {
        400: "Cut off",
        404: "Not found",
        409: "The present state forbids it",
        413: "Too large",
        415: "Wrong content type",
        429: "Busy",
        503: "A part is away",
    }
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    return {status: {"description": words[status], "model": ProblemDocument, "content": content} for status in statuses}


@contextmanager
def on_disk(file: UploadFile, target: Path) -> Iterator[Path]:
    """The upload as a file of its own for as long as the block lasts, copied in constant memory."""
    try:
        with target.open("wb") as out:
            shutil.copyfileobj(file.file, out, 1 << 20)
        yield target
    finally:
        target.unlink(missing_ok=True)
