"""Jobs: the lease query, fenced writes, and a job's events, metrics and checkpoints.

Every write of an attempt has its epoch in the WHERE clause. A zombie (an attempt whose lease expired and whose job
another worker leased) therefore changes no row, and gets LeaseLostError.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from app.db.base import clock
from app.db.repositories.paging import page_after
from app.db.repositories.rows import first, put
from app.db.tables import (
    AdapterRow,
    ArtifactRow,
    CheckpointRow,
    EvaluationAnswerRow,
    EventRow,
    JobRow,
    MetricRow,
)
from app.domain.errors import LeaseLostError
from app.domain.jobs import LEASED, MAX_ATTEMPTS, TERMINAL, JobStatus, Lease

S = JobStatus

_JOBS = JobRow.__table__.c
_WAITING = JobRow.__table__.alias("waiting")
_AHEAD = select(func.count()).where(
    _WAITING.c.status == S.QUEUED, _WAITING.c.kind == _JOBS.kind, _WAITING.c.id <= _JOBS.id
)

JOB_COLUMNS: Select[*tuple[Any, ...]] = select(
    *(_JOBS[name] for name in ("id", "kind", "name", "status", "attempts", "adapter_id")),
    *(_JOBS[name] for name in ("created_at", "started_at", "finished_at")),
    *(cast(_JOBS[name], Text).label(name) for name in ("spec", "plan", "progress", "error")),
    case((_JOBS.status == S.QUEUED, _AHEAD.scalar_subquery())).label("queue_position"),
)
"""The columns of a job's answer, in one statement without ORM rows, because clients poll it. Documents are JSON text.
`queue_position` is 1 for the next job of its kind, and null if the job does not wait."""

_REFERENCES: BindParameter[str] = bindparam("references", expanding=True)
_BY_REFERENCE = JOB_COLUMNS.where(or_(_JOBS.id.in_(_REFERENCES), _JOBS.name.in_(_REFERENCES)))


class Jobs:
    def __init__(self, session: Session) -> None:
        self._session = session

    # For users.

    def add(self, row: JobRow) -> None:
        self._session.add(row)
        self._session.flush()

    def find(self, reference: str) -> JobRow | None:
        """Find a row by id or by name."""
        wanted = select(JobRow).where(or_(JobRow.id == reference, JobRow.name == reference))
        return first(self._session, wanted)

    def get_jobs(self, references: Sequence[str]) -> list[Row[*tuple[Any, ...]]]:
        """`JOB_COLUMNS` of the jobs with these ids or names, in any order. Unknown references are left out."""
        return list(self._session.execute(_BY_REFERENCE, {"references": references}))

    def list_jobs(
        self, after: str | None, limit: int, status: JobStatus | None
    ) -> tuple[list[Row[*tuple[Any, ...]]], bool]:
        wanted = JOB_COLUMNS if status is None else JOB_COLUMNS.where(_JOBS.status == status)
        rows = list(self._session.execute(page_after(wanted, _JOBS.id, after, limit)))
        return rows[:limit], len(rows) > limit

    def move(self, job_id: str, before: JobStatus, after: JobStatus) -> bool:
        """Change the status if it is still `before`. Returns whether it was."""
        values: dict[str, Any] = {"status": after.value}
        if after is S.CANCELLED:
            values["finished_at"] = datetime.now(UTC)
        changed = update(JobRow).where(JobRow.id == job_id, JobRow.status == before.value).values(**values)
        return _rows_changed(self._session.execute(changed)) == 1

    def delete(self, row: JobRow) -> set[str]:
        """Delete a job with all that belongs to it. Returns the blobs that its checkpoints and artifacts referred to.

        Its adapter remains, and no longer refers to the job.
        """
        files = delete(CheckpointRow).where(CheckpointRow.job_id == row.id).returning(CheckpointRow.files)
        artifacts = delete(ArtifactRow).where(ArtifactRow.job_id == row.id).returning(ArtifactRow.digest)
        blobs = {digest for names in self._session.scalars(files) for digest in names.values()}
        blobs |= set(self._session.scalars(artifacts))
        self._session.execute(delete(EventRow).where(EventRow.job_id == row.id))
        self._session.execute(delete(MetricRow).where(MetricRow.job_id == row.id))
        self._session.execute(delete(EvaluationAnswerRow).where(EvaluationAnswerRow.job_id == row.id))
        self._session.execute(update(AdapterRow).where(AdapterRow.job_id == row.id).values(job_id=None))
        self._session.execute(delete(JobRow).where(JobRow.id == row.id))
        return blobs

    # For attempts.

    def lease(self, kinds: Sequence[str], owner: str, seconds: float) -> JobRow | None:
        """Lease the oldest job that waits or whose lease expired, in one atomic UPDATE.

        The returned row is `running` for its new owner. If the lease expired while the job was to pause, to cancel or
        at its last strike, the row is `paused`, `cancelled` or `failed`, and the caller must ask again.
        """
        expired = and_(JobRow.status.in_([s.value for s in LEASED]), JobRow.lease_until < clock())
        takeable = and_(JobRow.kind.in_(kinds), or_(JobRow.status == S.QUEUED, expired))
        oldest = select(JobRow.id).where(takeable).order_by(JobRow.id).limit(1).with_for_update(skip_locked=True)
        lost = and_(JobRow.status == S.RUNNING, JobRow.strikes + 1 >= MAX_ATTEMPTS)
        following = case(
            (JobRow.status == S.CANCELLING, literal(S.CANCELLED.value)),
            (JobRow.status == S.PAUSING, literal(S.PAUSED.value)),
            (lost, literal(S.FAILED.value)),
            else_=literal(S.RUNNING.value),
        )
        taken = (
            update(JobRow)
            .where(JobRow.id == oldest.scalar_subquery(), takeable)
            .values(
                status=following,
                owner=owner,
                epoch=JobRow.epoch + 1,
                lease_until=clock() + seconds,
                attempts=case(
                    (and_(JobRow.status.in_([S.QUEUED, S.RUNNING]), ~lost), JobRow.attempts + 1),
                    else_=JobRow.attempts,
                ),
                strikes=case((JobRow.status == S.RUNNING, JobRow.strikes + 1), else_=JobRow.strikes),
                started_at=func.coalesce(JobRow.started_at, clock()),
            )
            .returning(JobRow.id)
        )
        job_id = self._session.scalar(taken)
        return None if job_id is None else self.find(job_id)

    def renew(self, lease: Lease, seconds: float) -> JobStatus:
        """Renew the lease. Returns the job's status, which shows what the user asked for."""
        renewed = update(JobRow).where(*_fence(lease)).values(lease_until=clock() + seconds).returning(JobRow.status)
        status = self._session.scalar(renewed)
        if status is None:
            raise LeaseLostError(f"{lease.job_id} is no longer leased at epoch {lease.epoch}")
        return JobStatus(status)

    def write(self, lease: Lease, **values: Any) -> None:
        """Change columns of a leased job."""
        if _rows_changed(self._session.execute(update(JobRow).where(*_fence(lease)).values(**values))) != 1:
            raise LeaseLostError(f"{lease.job_id} is no longer leased at epoch {lease.epoch}")

    def end(self, lease: Lease, from_states: Sequence[JobStatus], to: JobStatus, **values: Any) -> bool:
        """Set the status to `to` and end the lease, if the status is one of `from_states`. Returns whether it was."""
        self.write(lease, owner=lease.owner)  # raises for a lost lease, and locks the row against users' requests
        finished = datetime.now(UTC) if to in (S.SUCCEEDED, S.FAILED, S.CANCELLED) else None
        states = [state.value for state in from_states]
        ended = (
            update(JobRow)
            .where(*_fence(lease), JobRow.status.in_(states))
            .values(status=to.value, owner=None, lease_until=None, finished_at=finished, **values)
        )
        return _rows_changed(self._session.execute(ended)) == 1

    # Events, metrics, checkpoints.

    def add_event(self, job_id: str, kind: str, message: str, level: str, data: dict[str, Any]) -> int:
        """Append an event. Its number is a counter in the job's row, so numbers have no gaps."""
        counted = (
            update(JobRow).where(JobRow.id == job_id).values(event_seq=JobRow.event_seq + 1).returning(JobRow.event_seq)
        )
        seq = self._session.scalar(counted)
        values = {"job_id": job_id, "seq": seq, "at": datetime.now(UTC), "level": level}
        self._session.execute(insert(EventRow).values(**values, kind=kind, message=message, data=data))
        return int(seq or 0)

    def events(self, job_id: str, after: int, limit: int) -> list[EventRow]:
        wanted = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
        return list(self._session.scalars(wanted.order_by(EventRow.seq).limit(limit)))

    def latest_events(self, job_ids: Sequence[str]) -> dict[str, int]:
        """Job id → the number of its newest event. Deleted jobs are left out."""
        wanted = select(JobRow.id, JobRow.event_seq).where(JobRow.id.in_(job_ids))
        return {row.id: row.event_seq for row in self._session.execute(wanted)}

    def put_metrics(self, job_id: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write a batch of metrics. If a resumed attempt repeats an update, its row is replaced."""
        for values in rows:
            put(self._session, MetricRow(job_id=job_id, update=values["update"], values=values))

    def add_to_metric(self, job_id: str, update: int, values: dict[str, Any]) -> None:
        """Add values to the row of an update, if it exists."""
        row = self._session.get(MetricRow, (job_id, update))
        if row is not None:
            row.values = row.values | values

    def metrics(self, job_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        wanted = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.update > after)
        rows = self._session.scalars(wanted.order_by(MetricRow.update).limit(limit))
        return [row.values for row in rows]

    def put_checkpoint(self, row: CheckpointRow) -> None:
        put(self._session, row)

    def checkpoints(self, job_id: str) -> list[CheckpointRow]:
        """The checkpoints of a job, newest first."""
        wanted = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        return list(self._session.scalars(wanted.order_by(CheckpointRow.update.desc())))

    def find_checkpoint(self, job_id: str, update: int) -> CheckpointRow | None:
        wanted = select(CheckpointRow).where(CheckpointRow.job_id == job_id, CheckpointRow.update == update)
        return first(self._session, wanted)

    def drop_checkpoint(self, row: CheckpointRow) -> None:
        self._session.delete(row)

    def has_checkpoints_of_ended(self, before: datetime) -> bool:
        """Whether a job that ended before then still has a checkpoint."""
        wanted = select(CheckpointRow.job_id).where(CheckpointRow.job_id.in_(_ended(before))).limit(1)
        return self._session.scalar(wanted) is not None

    def drop_checkpoints_of_ended(self, before: datetime) -> list[dict[str, str]]:
        """Delete the checkpoints of jobs that ended before then. Returns the files of each."""
        deleted = delete(CheckpointRow).where(CheckpointRow.job_id.in_(_ended(before))).returning(CheckpointRow.files)
        return list(self._session.scalars(deleted))


def _ended(before: datetime) -> Select[str]:
    return select(JobRow.id).where(JobRow.finished_at < before, JobRow.status.in_([s.value for s in TERMINAL]))


def _fence(lease: Lease) -> tuple[Any, ...]:
    return (JobRow.id == lease.job_id, JobRow.epoch == lease.epoch, JobRow.owner == lease.owner)


def _rows_changed(result: Any) -> int:
    return int(result.rowcount)
