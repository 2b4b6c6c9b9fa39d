"""Jobs for workers: lease, heartbeat, record, checkpoint, end. Every write is fenced by the epoch of the lease."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from app.db import Database, Unit
from app.db.tables import CheckpointRow, JobRow
from app.domain.adapters import Manifest
from app.domain.attempts import CheckpointWritten, EvaluationFinished, UpdateMetrics
from app.domain.errors import NotFoundError
from app.domain.jobs import MAX_ATTEMPTS, TERMINAL, JobError, JobProgress, JobSpec, JobStatus, Lease
from app.domain.ledger import OwnedReservation
from app.domain.splits import SplitName
from app.services.jobs import best_of
from app.services.plans import Plans, Prepared
from app.services.staged_blobs import staged
from app.storage import Blob, Blobs

_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)

CHECKPOINTS_KEPT = 2
S = JobStatus

_SETTLED = {
    S.CANCELLED: ("cancelled", "cancelled; its worker was lost", "info"),
    S.PAUSED: ("paused", "paused; its worker was lost", "info"),
    S.FAILED: ("failed", f"lost {MAX_ATTEMPTS} workers without a new checkpoint", "error"),
}
_RELEASED = {
    S.CANCELLING: (S.CANCELLED, ("cancelled", "cancelled", "info")),
    S.PAUSING: (S.PAUSED, ("paused", "paused", "info")),
}
WORKER_LOST = JobError(
    code="worker_lost",
    message=f"{MAX_ATTEMPTS} attempts were lost without an error and without a new checkpoint",
    hint="look at the worker's log: the kernel may have killed it for memory; a smaller batch_size takes less",
)


@dataclass(frozen=True, slots=True)
class Leased:
    """A job that an attempt has leased."""

    lease: Lease
    job_id: str
    name: str
    kind: str
    spec: JobSpec
    attempt: int


class Attempts:
    def __init__(self, database: Database, blobs: Blobs, plans: Plans, lease_seconds: float) -> None:
        self._database = database
        self._blobs = blobs
        self._plans = plans
        self.lease_seconds = lease_seconds

    def lease(self, kinds: tuple[str, ...], owner: str) -> Leased | None:
        """Lease the oldest job that this worker may run. None if no job waits."""
        while True:
            with self._database.write() as unit:
                row = unit.jobs.lease(kinds, owner, self.lease_seconds)
                if row is None:
                    return None
                lease = Lease(job_id=row.id, epoch=row.epoch, owner=owner)
                if row.status == S.RUNNING:
                    data = {"worker": owner, "attempt": row.attempts}
                    unit.jobs.add_event(row.id, "started", f"attempt {row.attempts} began", "info", data)
                    return _leased(row, lease)
                _settle(unit, row, lease)

    def renew(self, lease: Lease, reservation: OwnedReservation | None = None) -> JobStatus:
        """The heartbeat: renew the lease and return the job's status, which shows what the user asked for.

        `reservation`: the device's. It is renewed with the lease, or reserved again if it expired.
        """
        with self._database.write() as unit:
            status = unit.jobs.renew(lease, self.lease_seconds)
            if reservation is not None:
                unit.reservations.put(reservation, self.lease_seconds)
            return status

    def prepare(self, leased: Leased, worker: str) -> Prepared:
        """Resolve the spec's references again, for this attempt on the device of `worker`.

        The encoded rows come from the blob store.
        """
        return self._plans.prepare(leased.spec.model_dump(mode="json"), worker=worker)

    def fetch(self, digest: str, path: Path) -> Path:
        return self._blobs.fetch(digest, path)

    def add_event(
        self, lease: Lease, kind: str, message: str, level: str = "info", data: dict[str, Any] | None = None
    ) -> None:
        """Write an event of the job."""
        with self._database.write() as unit:
            unit.jobs.write(lease, owner=lease.owner)
            unit.jobs.add_event(lease.job_id, kind, message, level, data or {})

    def record(self, lease: Lease, batch: list[UpdateMetrics], eta_seconds: float | None) -> None:
        """Write a batch of metrics, and the job's progress by the last of them."""
        last = batch[-1]
        loss = next((m.loss for m in reversed(batch) if m.loss is not None), None)
        progress = JobProgress(
            update=last.update,
            total_updates=last.total_updates,
            epoch=last.epoch,
            loss=loss,
            tokens_per_second=last.tokens_per_second,
            eta_seconds=eta_seconds,
        )
        columns = {"event", "total_updates"}
        with self._database.write() as unit:
            unit.jobs.write(lease, progress=progress.model_dump(mode="json"))
            unit.jobs.put_metrics(lease.job_id, [m.model_dump(mode="json", exclude=columns) for m in batch])
            for metric in batch:
                if metric.skipped:
                    message = f"update {metric.update} skipped: loss or gradients were not finite"
                    unit.jobs.add_event(lease.job_id, "update_skipped", message, "warning", {"update": metric.update})

    def warn(self, lease: Lease, warnings: Sequence[str]) -> None:
        """Write what speaks against the result of this attempt: on the job, and as an event for each."""
        if not warnings:
            return
        with self._database.write() as unit:
            row = unit.jobs.find(lease.job_id)
            assert row is not None, "a leased job is not deleted"
            unit.jobs.write(lease, progress={**(row.progress or {}), "warnings": list(warnings)})
            for warning in warnings:
                unit.jobs.add_event(lease.job_id, "warning", warning, "warning", {})

    def evaluated(self, lease: Lease, found: EvaluationFinished) -> None:
        """Record an evaluation as an event. Add it to the metrics of its update, if those are stored already."""
        measured = "not finite" if found.loss is None else f"{found.loss:.4f}"
        message = f"{found.part} loss {measured}, token accuracy {found.accuracy:.1%}"
        if found.verdict_accuracy is not None:
            message += f", verdict accuracy {found.verdict_accuracy:.1%}"
        message += f" at update {found.update}"
        with self._database.write() as unit:
            unit.jobs.write(lease, owner=lease.owner)
            unit.jobs.add_event(
                lease.job_id, "evaluated", message, "info", found.model_dump(mode="json", exclude={"event"})
            )
            if found.part is SplitName.VALIDATION:
                values = {
                    "validation_loss": found.loss,
                    "validation_accuracy": found.accuracy,
                    "validation_verdict_accuracy": found.verdict_accuracy,
                }
                unit.jobs.add_to_metric(lease.job_id, found.update, values)

    def checkpoint(self, lease: Lease, written: CheckpointWritten, manifest: Manifest | None = None) -> None:
        """Upload a checkpoint and commit its row. Of the older ones, only the newest and the best remain.

        `manifest`: the manifest of an adapter with these weights.
        """
        with staged(self._database, self._blobs) as blobs:
            files = {path.name: blobs.put_file(path) for path in sorted(written.path.iterdir())}
            lost = self._commit_checkpoint(lease, written, files, manifest)
        self._blobs.discard(lost)

    def _commit_checkpoint(
        self, lease: Lease, written: CheckpointWritten, files: dict[str, Blob], manifest: Manifest | None
    ) -> set[str]:
        """Write the checkpoint's row and drop older ones. Returns the blobs that are now unreferenced."""
        row = CheckpointRow(
            job_id=lease.job_id,
            update=written.update,
            digest=written.digest,
            files={name: blob.digest for name, blob in files.items()},
            bytes=sum(blob.size for blob in files.values()),
            validation_loss=written.validation_loss,
            manifest=manifest and manifest.model_dump(mode="json"),
            created_at=datetime.now(UTC),
        )
        with self._database.write() as unit:
            unit.jobs.write(lease, strikes=0)
            unit.jobs.put_checkpoint(row)
            data = {"update": written.update, "bytes": row.bytes}
            unit.jobs.add_event(lease.job_id, "checkpoint", f"checkpoint at update {written.update}", "info", data)
            checkpoints = unit.jobs.checkpoints(lease.job_id)
            stale = [old for old in checkpoints[CHECKPOINTS_KEPT:] if old is not best_of(checkpoints)]
            for old in stale:
                unit.jobs.drop_checkpoint(old)
            unit.session.flush()
            return unit.blob_references.unreferenced({blob for old in stale for blob in old.files.values()})

    def restore(self, lease: Lease, directory: Path) -> Path | None:
        """Copy the newest checkpoint into `directory`. Skip a lost or damaged one. None if there is none."""
        with self._database.read() as unit:
            rows = unit.jobs.checkpoints(lease.job_id)
        for row in rows:
            target = directory / f"update-{row.update:06d}"
            try:
                for name, digest in row.files.items():
                    self._blobs.fetch(digest, target / name)
            except NotFoundError as error:  # of this checkpoint alone; a full disk would fail the older ones, too
                shutil.rmtree(target, ignore_errors=True)
                data = {"update": row.update, "reason": error.code}
                self.add_event(lease, "checkpoint_damaged", "a checkpoint could not be read", "warning", data)
                continue
            return target
        return None

    def succeed(self, lease: Lease, message: str, data: dict[str, Any]) -> None:
        """End a job that publishes no adapter, or end it as cancelled if the user asked to cancel."""
        with self._database.write() as unit:
            if unit.jobs.end(lease, (S.RUNNING, S.PAUSING), S.SUCCEEDED):
                unit.jobs.add_event(lease.job_id, "succeeded", message, "info", data)
            elif unit.jobs.end(lease, (S.CANCELLING,), S.CANCELLED):
                unit.jobs.add_event(lease.job_id, "cancelled", "cancelled", "info", {})

    def fail(self, lease: Lease, error: JobError) -> None:
        """End the job as failed, or as cancelled if the user asked to cancel."""
        with self._database.write() as unit:
            document = error.model_dump(mode="json")
            if unit.jobs.end(lease, (S.RUNNING, S.PAUSING), S.FAILED, error=document):
                unit.jobs.add_event(lease.job_id, "failed", error.message, "error", document)
            elif unit.jobs.end(lease, (S.CANCELLING,), S.CANCELLED):
                unit.jobs.add_event(lease.job_id, "cancelled", "cancelled", "info", {})

    def release(self, lease: Lease, reason: str, *, strike: bool, error: JobError = WORKER_LOST) -> None:
        """Put a job back into the queue, or pause or cancel it as the user asked.

        `strike`: the attempt was lost, not ended on purpose. Too many strikes without a checkpoint fail the job, with
        `error`.
        """
        with self._database.write() as unit:
            status = unit.jobs.renew(lease, self.lease_seconds)
            row = unit.jobs.find(lease.job_id)
            strikes = (row.strikes if row else 0) + int(strike)
            if strikes >= MAX_ATTEMPTS:
                message = f"{_SETTLED[S.FAILED][1]}: {reason}"
                following, told = S.FAILED, ("failed", message, "error")
            else:
                following, told = _RELEASED.get(status, (S.QUEUED, ("requeued", reason, "warning")))
            document = error.model_dump(mode="json") if following is S.FAILED else None
            unit.jobs.end(lease, (status,), following, strikes=strikes, error=document)
            unit.jobs.add_event(lease.job_id, *told, {"reason": reason, "strikes": strikes})


def _leased(row: JobRow, lease: Lease) -> Leased:
    return Leased(
        lease=lease,
        job_id=row.id,
        name=row.name,
        kind=row.kind,
        spec=_SPEC.validate_python(row.spec),
        attempt=row.attempts,
    )


def _settle(unit: Unit, row: JobRow, lease: Lease) -> None:
    """Write the end that the lease query chose for a job whose worker was lost."""
    status = JobStatus(row.status)
    kind, message, level = _SETTLED[status]
    values: dict[str, Any] = {"owner": None, "lease_until": None}
    if status in TERMINAL:
        values["finished_at"] = datetime.now(UTC)
    if status is S.FAILED:
        values["error"] = WORKER_LOST.model_dump(mode="json")
    unit.jobs.write(lease, **values)
    unit.jobs.add_event(row.id, kind, message, level, {})
