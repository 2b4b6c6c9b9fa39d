"""/corpora: upload, list, search, promote and delete corpora."""

from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Response, UploadFile

from app.api.dependencies import AFTER, IdOf, Limit, Page, ServicesDep, form_of, named, on_disk, problems
from app.api.routing import StrictRoute
from app.knowledge import Hit
from app.services.corpora import Corpus

router = APIRouter(prefix="/corpora", tags=["corpora"], route_class=StrictRoute)

CorpusReference = Annotated[str, named("corpus")]
After = Annotated[Annotated[str, IdOf("corp", "a corpus")] | None, AFTER]
Words = Annotated[
    str,
    Query(min_length=1, max_length=1_000, description="Any words.", openapi_examples={"river": {"value": "river"}}),
]


@router.post(
    "",
    status_code=201,
    summary="Upload a corpus",
    responses={200: {"model": Corpus, "description": "A corpus with these pages exists already"}, **problems(409)},
    dependencies=[form_of("file", "name")],
)
def upload_corpus(
    services: ServicesDep,
    response: Response,
    file: Annotated[UploadFile, File(description="JSONL; each line is {title, text} or {title, sentences}.")],
    name: Annotated[str | None, Form(description="A unique name. The default is made from the file's name.")] = None,
) -> Corpus:
    """Build a searchable, immutable snapshot of pages. The first corpus becomes the default."""
    with on_disk(file, services.datasets.scratch_file()) as path:
        made, new = services.corpora.create(path, file.filename or "upload", name)
    response.status_code = 201 if new else 200
    return made


@router.get("", summary="List corpora")
def list_corpora(services: ServicesDep, after: After = None, limit: Limit = 20) -> Page[Corpus]:
    """Newest first."""
    data, more = services.corpora.list_corpora(after, limit)
    return Page(data=data, has_more=more)


@router.get("/{corpus}", summary="A corpus and the account of its upload", responses=problems(404))
def get_corpus(services: ServicesDep, corpus: CorpusReference) -> Corpus:
    """`digest` identifies the snapshot. Predictions give it with every Observation."""
    return services.corpora.get(corpus)


@router.get("/{corpus}/search", summary="Search a corpus by free text", responses=problems(404))
def search_corpus(
    services: ServicesDep,
    corpus: CorpusReference,
    q: Words,
    limit: Annotated[int, Query(ge=1, le=50, description="Maximum number of pages.")] = 10,
) -> Page[Hit]:
    """Rank pages by BM25, best first. Each comes with its sentence that contains most of the words."""
    return Page(data=list(services.corpora.find(corpus, q, limit)), has_more=False)


@router.post("/{corpus}/promote", summary="Make this the default corpus", responses=problems(404))
def promote_corpus(services: ServicesDep, corpus: CorpusReference) -> Corpus:
    """From now on, predictions that name no corpus search it."""
    return services.corpora.promote(corpus)


@router.delete("/{corpus}", status_code=204, summary="Delete a corpus", responses=problems(404))
def delete_corpus(services: ServicesDep, corpus: CorpusReference) -> None:
    """Delete its pages. Predictions that were made with it still have the text that they quote."""
    services.corpora.delete(corpus)
