"""/datasets: upload, list, preview and delete datasets."""

from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Response, UploadFile

from app.api.dependencies import AFTER, IdOf, Limit, Page, ServicesDep, form_of, named, on_disk, problems
from app.api.routing import StrictRoute
from app.domain.datasets import RowKind
from app.domain.trajectories import Trajectory
from app.services.datasets import Dataset

router = APIRouter(prefix="/datasets", tags=["datasets"], route_class=StrictRoute)

DatasetReference = Annotated[str, named("dataset")]
After = Annotated[Annotated[str, IdOf("ds", "a dataset")] | None, AFTER]
Column = Annotated[str | None, Form(max_length=200, description="The name of this column in the file.")]


@router.post(
    "",
    status_code=201,
    summary="Upload a dataset",
    responses={200: {"model": Dataset, "description": "A dataset with this content exists already"}, **problems(409)},
    dependencies=[
        form_of(
            "file", "name", "claim_column", "trajectories_column", "label_column", "page_column", "split_column", "kind"
        )
    ],
)
def upload_dataset(
    services: ServicesDep,
    response: Response,
    file: Annotated[
        UploadFile, File(description="CSV, JSONL, JSON, Parquet or text: claim, trajectories[, label, split].")
    ],
    name: Annotated[str | None, Form(description="A unique name. The default is made from the file's name.")] = None,
    claim_column: Column = None,
    trajectories_column: Column = None,
    label_column: Column = None,
    page_column: Column = None,
    split_column: Column = None,
    kind: Annotated[
        RowKind,
        Form(
            description="`claims`: the rows are claims with labels, and with `page` or `evidence` if known. No steps."
        ),
    ] = "trajectories",
) -> Dataset:
    """Validate a file row by row and keep the rows that can be trained on.

    The response counts the rows that were kept, repaired, warned about and refused. Each finding names its line. One
    kept row is enough for a dataset. Uploading the same content again returns the same dataset (200).

    With `kind=claims` a row needs a claim and a label only. Such a dataset can be judged by `POST /evaluations`, and
    `POST /datasets/synthesize` makes trajectories of it.
    """
    given = {
        "claim": claim_column,
        "trajectories": trajectories_column,
        "label": label_column,
        "page": page_column,
        "split": split_column,
    }
    columns = {word: column for word, column in given.items() if column}
    with on_disk(file, services.datasets.scratch_file()) as path:
        made, new = services.datasets.create(path, file.filename or "upload", file.content_type, name, columns, kind)
    response.status_code = 201 if new else 200
    return made


@router.get("", summary="List datasets")
def list_datasets(services: ServicesDep, after: After = None, limit: Limit = 20) -> Page[Dataset]:
    """Newest first."""
    data, more = services.datasets.list_datasets(after, limit)
    return Page(data=data, has_more=more)


@router.get("/{dataset}", summary="A dataset and the account of its upload", responses=problems(404))
def get_dataset(services: ServicesDep, dataset: DatasetReference) -> Dataset:
    """Counts, labels, lengths, and the first 200 findings with their lines. The counts cover all findings."""
    return services.datasets.get(dataset)


@router.get("/{dataset}/preview", summary="Rows of a dataset, as they were parsed", responses=problems(404))
def preview_dataset(
    services: ServicesDep,
    dataset: DatasetReference,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Row number of the last row of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of rows.")] = 5,
) -> Page[Trajectory]:
    """Steps, verdict and evidence of the kept rows, in the file's order."""
    data, more = services.datasets.preview(dataset, after, limit)
    return Page(data=data, has_more=more)


@router.delete("/{dataset}", status_code=204, summary="Delete a dataset", responses=problems(404, 409))
def delete_dataset(services: ServicesDep, dataset: DatasetReference) -> None:
    """Delete its rows. Refused (409) while an unfinished job uses it."""
    services.datasets.delete(dataset)
