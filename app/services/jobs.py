"""Jobs for users: submit, list, follow, cancel, pause, resume, delete. Workers use `attempts`."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import CheckpointRow, JobRow
from app.domain.errors import ConflictError, InvalidError, Loc, NotFoundError, Problem
from app.domain.identity import new_id
from app.domain.jobs import (
    ACTION_TRANSITIONS,
    TERMINAL,
    AnyProgress,
    Checkpoint,
    Event,
    Job,
    JobAction,
    JobError,
    JobPlan,
    JobProgress,
    JobSpec,
    JobStatus,
    Metric,
)
from app.domain.plans import Plan
from app.domain.remedies import Change
from app.domain.specs import JobKind, TrainSpec
from app.queue import Doorbell
from app.services.evaluations import Evaluations
from app.services.naming import check_name
from app.services.plans import Plans, Prepared
from app.storage import Blobs

_MESSAGES = {
    JobStatus.CANCELLED: "cancelled before it ran",
    JobStatus.CANCELLING: "asked to cancel",
    JobStatus.PAUSED: "paused",
    JobStatus.PAUSING: "asked to pause after a checkpoint",
    JobStatus.QUEUED: "resumed; waiting for a worker",
}


_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)
_PLAN: TypeAdapter[JobPlan | None] = TypeAdapter(JobPlan | None)
_PROGRESS: TypeAdapter[AnyProgress | None] = TypeAdapter(AnyProgress | None)
_ERROR: TypeAdapter[JobError | None] = TypeAdapter(JobError | None)
_NOTHING = "null"

PARSED_DOCUMENTS = 256
"""Size of the cache of parsed documents, for each kind."""


class Jobs:
    def __init__(
        self, database: Database, blobs: Blobs, plans: Plans, evaluations: Evaluations, doorbell: Doorbell
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._plans = plans
        self._evaluations = evaluations
        self._doorbell = doorbell

    def plan(self, data: Any, device: str | None = None, *, every_row: bool = False) -> Plan:
        """Plan a job with this config, on `device` or on the deployment's trainer. Queues nothing.

        `every_row`: list all over-length rows that were noted, not only the first ones.
        """
        prepared = self._plans.with_remedies(self._plans.prepare(data, device=device))
        self._evaluations.resolve_evaluate_after(prepared.spec)
        listed = {"overlength": prepared.summary.notes} if every_row else {}
        return prepared.plan.model_copy(update=listed)

    def submit(self, data: Any) -> Job:
        """Queue a job. The doorbell rings after the row is committed.

        Raises InvalidError for an invalid name. Raises it, with remedies, if the job does not fit the trainer's memory.
        """
        prepared = self._plans.with_remedies(self._plans.prepare(data))
        check_name(prepared.spec.name)
        _refuse_if_too_large(prepared.plan)
        row = _row(prepared, self._evaluations.resolve_evaluate_after(prepared.spec))
        try:
            with self._database.write() as unit:
                _refuse_name_of_adapter(unit, row.name)
                unit.jobs.add(row)
                details = {"total_updates": prepared.schedule.updates, "rows": prepared.summary.trained}
                unit.jobs.add_event(row.id, "queued", "waiting for a worker", "info", details)
                for warning in prepared.plan.warnings:
                    unit.jobs.add_event(row.id, "plan_warning", warning, "warning", {})
        except IntegrityError:
            self._check_dataset_exists(row)
            raise ConflictError(
                f"there is a job named {row.name!r} already; choose another name or leave it out",
                code="name_taken",
            ) from None
        self._doorbell.ring(row.id, JobKind(row.kind))
        return self.get(row.id)

    def _check_dataset_exists(self, row: JobRow) -> None:
        with self._database.read() as unit:
            if row.dataset_id is not None and unit.datasets.find(row.dataset_id) is None:
                raise NotFoundError("the dataset was deleted while the job was submitted", code="unknown_dataset")

    def get(self, reference: str) -> Job:
        found = self.get_jobs([reference]).get(reference)
        if found is None:
            raise unknown_job(reference)
        return found

    def get_jobs(self, references: Sequence[str]) -> dict[str, Job]:
        """Reference → its job. Unknown references are left out. An id wins over an equal name."""
        with self._database.read() as unit:
            jobs = [_to_job(row) for row in unit.jobs.get_jobs(references)]
        return {job.name: job for job in jobs} | {job.id: job for job in jobs}

    def list_jobs(self, after: str | None, limit: int, status: JobStatus | None) -> tuple[list[Job], bool]:
        with self._database.read() as unit:
            rows, more = unit.jobs.list_jobs(after, limit, status)
        return [_to_job(row) for row in rows], more

    def request_action(self, reference: str, action: JobAction) -> Job:
        """Cancel, pause or resume. A repeated request changes nothing. Raises ConflictError if the state forbids it."""
        with self._database.write() as unit:
            row = _get_row(unit, reference)
            status = JobStatus(row.status)
            following = ACTION_TRANSITIONS[action].get(status)
            if following is None:
                known = " or ".join(ACTION_TRANSITIONS[action])
                raise ConflictError(
                    f"{row.id} is {status}; only a job that is {known} can be asked to {action}",
                    code="wrong_state",
                )
            if following is not status:
                unit.jobs.move(row.id, status, following)
                unit.jobs.add_event(row.id, following.value, _MESSAGES[following], "info", {})
        if following is JobStatus.QUEUED:
            self._doorbell.ring(row.id, JobKind(row.kind))
        return self.get(row.id)

    def delete(self, reference: str) -> None:
        """Delete a job that has ended, with its events, metrics, checkpoints and artifacts. Its adapter stays.

        Raises ConflictError for a job that has not ended.
        """
        with self._database.write() as unit:
            row = _get_row(unit, reference)
            if row.status not in TERMINAL:
                raise ConflictError(
                    f"{row.id} is {row.status}; only a job that has ended can be deleted: cancel it first, or wait",
                    code="wrong_state",
                )
            unreferenced = unit.blob_references.unreferenced(unit.jobs.delete(row))
        for digest in unreferenced:
            self._blobs.delete(digest)

    def events(self, reference: str, after: int, limit: int) -> tuple[list[Event], bool]:
        """(the events after number `after`, oldest first; whether more follow)."""
        with self._database.read() as unit:
            job = _get_row(unit, reference)
            rows = unit.jobs.events(job.id, after, limit + 1)
        found = [
            Event.model_validate(
                {
                    "seq": r.seq,
                    "at": r.at,
                    "level": r.level,
                    "kind": r.kind,
                    "message": r.message,
                    "data": r.data,
                }
            )
            for r in rows
        ]
        return found[:limit], len(found) > limit

    def metrics(self, reference: str, after: int, limit: int) -> tuple[list[Metric], bool]:
        """(the metrics of the updates after `after`, oldest first; whether more follow)."""
        with self._database.read() as unit:
            job = _get_row(unit, reference)
            rows = unit.jobs.metrics(job.id, after, limit + 1)
        return [Metric.model_validate(values) for values in rows[:limit]], len(rows) > limit

    def checkpoints(self, reference: str) -> list[Checkpoint]:
        with self._database.read() as unit:
            job = _get_row(unit, reference)
            rows = unit.jobs.checkpoints(job.id)
        best = best_of(rows)
        return [
            Checkpoint(
                update=row.update,
                digest=row.digest,
                created_at=row.created_at,
                bytes=row.bytes,
                validation_loss=row.validation_loss,
                best=row is best,
            )
            for row in rows
        ]


def best_of(rows: Sequence[CheckpointRow]) -> CheckpointRow | None:
    """The checkpoint with the lowest validation loss. None if none was evaluated."""
    return min(
        (row for row in rows if row.validation_loss is not None),
        key=lambda row: (row.validation_loss, row.update),
        default=None,
    )


def _get_row(unit: Unit, reference: str) -> JobRow:
    row = unit.jobs.find(reference)
    if row is None:
        raise unknown_job(reference)
    return row


def _refuse_name_of_adapter(unit: Unit, name: str) -> None:
    if unit.adapters.find(name) is not None:
        raise ConflictError(
            f"there is an adapter named {name!r} already, and a job's adapter gets its name; choose another one",
            code="name_taken",
        )


def _refuse_if_too_large(plan: Plan) -> None:
    if plan.fits is not False or plan.memory is None or plan.device_bytes is None:
        return
    takes = f"{_gibibytes(plan.memory.total)}, and {plan.device} has {_gibibytes(plan.device_bytes)}"
    found = tuple(
        Problem(
            _first_key_path(remedy.change),
            f"takes {takes}",
            f"with {json.dumps(remedy.change)} it takes {_gibibytes(remedy.bytes)}",
        )
        for remedy in plan.remedies
    )
    way_out = f"; {found[0].hint}" if found else "; nothing that could be changed makes it fit"
    raise InvalidError(f"the job takes {takes}{way_out}", code="does_not_fit", problems=found)


def _first_key_path(change: Change) -> Loc:
    """The path of the first key that a change sets."""
    key, value = next(iter(change.items()))
    return (key, *_first_key_path(value)) if isinstance(value, dict) and value else (key,)


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def unknown_job(reference: str) -> NotFoundError:
    return NotFoundError(f"there is no job {reference!r}; GET /jobs lists them", code="unknown_job")


def _row(prepared: Prepared, spec: TrainSpec) -> JobRow:
    job_id = new_id("job")
    frozen = spec.model_copy(update={"base_model": prepared.base.name, "dataset": prepared.dataset.id})
    return JobRow(
        id=job_id,
        kind=spec.kind,
        name=spec.name or f"{prepared.dataset.name[:60]}-{job_id[-8:]}",
        status=JobStatus.QUEUED.value,
        spec=frozen.model_dump(mode="json"),
        plan=prepared.plan.model_dump(mode="json"),
        progress=JobProgress(total_updates=prepared.schedule.updates).model_dump(mode="json"),
        error=None,
        dataset_id=prepared.dataset.id,
        base_model=prepared.base.name,
        created_at=datetime.now(UTC),
    )


def _to_job(row: Any) -> Job:
    return Job(
        id=row.id,
        kind=JobKind(row.kind),
        name=row.name,
        status=JobStatus(row.status),
        spec=_read_spec(row.spec),
        plan=_read_plan(row.plan),
        progress=_PROGRESS.validate_json(row.progress or _NOTHING),
        queue_position=row.queue_position,
        attempts=row.attempts,
        adapter_id=row.adapter_id,
        error=_ERROR.validate_json(row.error or _NOTHING),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


# A job's spec and plan never change, and clients poll: cache the parsed documents by their text.


@lru_cache(PARSED_DOCUMENTS)
def _read_spec(text: str) -> JobSpec:
    return _SPEC.validate_json(text)


@lru_cache(PARSED_DOCUMENTS)
def _read_plan(text: str | None) -> JobPlan | None:
    return _PLAN.validate_json(text or _NOTHING)
