"""Queues a job that the runner runs: its row and its first event, then the doorbell."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import IntegrityError

from app.db import Database
from app.db.tables import JobRow
from app.domain.errors import ConflictError
from app.domain.evaluations import EvaluationPlan, EvaluationProgress
from app.domain.identity import new_id
from app.domain.jobs import JobSpec, JobStatus
from app.domain.specs import JobKind
from app.domain.synthesis import SynthesisPlan, SynthesisProgress
from app.queue import Doorbell
from app.services.datasets import Datasets


def queue_job(
    database: Database,
    doorbell: Doorbell,
    datasets: Datasets,
    spec: JobSpec,
    plan: EvaluationPlan | SynthesisPlan,
    progress: EvaluationProgress | SynthesisProgress,
    details: dict[str, Any],
    base_model: str | None = None,
) -> str:
    """The id of a new job. The doorbell rings after the row is committed. `details`: data of the event.

    Raises ConflictError if its name is taken, and NotFoundError if its dataset was deleted meanwhile.
    """
    kind, job_id = JobKind(spec.kind), new_id("job")
    name = spec.name or f"{_NOUNS[kind]}-{job_id[-8:]}"
    row = JobRow(
        id=job_id,
        kind=kind.value,
        name=name,
        status=JobStatus.QUEUED.value,
        spec=spec.model_copy(update={"dataset": plan.dataset, "corpus": plan.corpus}).model_dump(mode="json"),
        plan=plan.model_dump(mode="json"),
        progress=progress.model_dump(mode="json"),
        error=None,
        dataset_id=plan.dataset,
        base_model=base_model,
        created_at=datetime.now(UTC),
    )
    try:
        with database.write() as unit:
            unit.jobs.add(row)
            unit.jobs.add_event(job_id, "queued", "waiting for a worker", "info", details)
    except IntegrityError:
        datasets.get(plan.dataset)  # raises NotFoundError if it was deleted meanwhile
        raise ConflictError(
            f"there is a job named {name!r} already; choose another name or leave it out", code="name_taken"
        ) from None
    doorbell.ring(job_id, kind)
    return job_id


_NOUNS = {JobKind.EVALUATE: "evaluation", JobKind.SYNTHESIZE: "synthesis", JobKind.REGROUND: "reground"}
