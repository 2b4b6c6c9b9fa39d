"""Queues a job that the runner runs: its row and its first event, then the doorbell."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import JobRow
from app.domain.errors import ConflictError
from app.domain.evaluations import EvaluationPlan, EvaluationProgress, EvaluationSpec
from app.domain.identity import new_id
from app.domain.jobs import JobStatus
from app.domain.specs import JobKind
from app.domain.synthesis import RegroundSpec, SynthesisPlan, SynthesisProgress, SynthesisSpec
from app.queue import Doorbell
from app.services.datasets import Datasets

_NOUNS = {JobKind.EVALUATE: "evaluation", JobKind.SYNTHESIZE: "synthesis", JobKind.REGROUND: "reground"}


def build_job_row(
    spec: EvaluationSpec | SynthesisSpec | RegroundSpec,
    plan: EvaluationPlan | SynthesisPlan,
    progress: EvaluationProgress | SynthesisProgress,
    base_model: str | None = None,
) -> JobRow:
    """The row of a new job, which refers to dataset and corpus by id. Its name is the spec's, or one with its id."""
    kind, job_id = JobKind(spec.kind), new_id("job")
    return JobRow(
        id=job_id,
        kind=kind.value,
        name=spec.name or f"{_NOUNS[kind]}-{job_id[-8:]}",
        status=JobStatus.QUEUED.value,
        spec=spec.model_copy(update={"dataset": plan.dataset, "corpus": plan.corpus}).model_dump(mode="json"),
        plan=plan.model_dump(mode="json"),
        progress=progress.model_dump(mode="json"),
        error=None,
        dataset_id=plan.dataset,
        base_model=base_model,
        created_at=datetime.now(UTC),
    )


def add_job(unit: Unit, row: JobRow, details: dict[str, Any]) -> None:
    """`details`: data of the job's first event."""
    unit.jobs.add(row)
    unit.jobs.add_event(row.id, "queued", "waiting for a worker", "info", details)


def queue_job(database: Database, doorbell: Doorbell, datasets: Datasets, row: JobRow, details: dict[str, Any]) -> str:
    """The id of the job, once its row is committed and the doorbell has rung.

    Raises ConflictError if its name is taken, and NotFoundError if its dataset was deleted meanwhile.
    """
    job_id, name, dataset = row.id, row.name, str(row.dataset_id)
    try:
        with database.write() as unit:
            add_job(unit, row, details)
    except IntegrityError:
        datasets.get(dataset)  # raises NotFoundError if it was deleted meanwhile
        raise ConflictError(
            f"there is a job named {name!r} already; choose another name or leave it out", code="name_taken"
        ) from None
    doorbell.ring(job_id, JobKind(row.kind))
    return job_id
