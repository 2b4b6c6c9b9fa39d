"""An attempt at a training job: prepare the order, reserve the device, run the child, write what it reports."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import structlog

from app.composition import Services
from app.domain.adapters import Environment
from app.domain.attempts import (
    BaseOnDisk,
    CheckpointWritten,
    ChildCommand,
    ChildEvent,
    EvaluationFinished,
    LogMessage,
    TrainingFailed,
    TrainingFinished,
    TrainingStarted,
    TrainOrder,
    UpdateMetrics,
)
from app.domain.jobs import JobStatus
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.attempt import Attempt
from worker.attempt_error import child_error
from worker.bases import ensure_base
from worker.child import GRACE, Child
from worker.device_reservation import TrainingReservation
from worker.heartbeat import Heartbeat
from worker.results import Results
from worker.watch import Watch

FLUSH_SECONDS = 1.0
LEAVE_SECONDS = 45.0
"""How long a child may take to write its checkpoint if this worker must leave."""

RESERVE_BYTES = 8 << 20
"""Room that is freed for the end of the attempt: database and work directory may share a disk, and both may fill it."""

log = structlog.get_logger(__name__)


class TrainingAttempt(Attempt):
    """`start_child` starts the process that trains, or takes the one that waits for a job."""

    def __init__(
        self,
        services: Services,
        leased: Leased,
        directory: Path,
        heartbeat: Heartbeat,
        leaving: threading.Event,
        start_child: Callable[[], Child],
    ) -> None:
        super().__init__(services, leased, directory, heartbeat, leaving)
        self._start_child = start_child

    def _run(self) -> None:
        prepared = self._retry(lambda: self._attempts.prepare(self._leased, self._services.settings.worker_name))
        order = self._retry(lambda: self._order(prepared))
        reservation = TrainingReservation(self._services, self._leased, prepared, self._heartbeat)
        results = Results(self._services, self._leased, prepared, self._directory)
        with reservation.acquired(self._leaving):
            watch = self._run_child(order, Watch(reservation, prepared.seconds_an_update), results)
        self._retry(results.store_artifacts)
        self._conclude(watch, results)

    def _order(self, prepared: Prepared) -> TrainOrder:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "reserve").open("wb") as reserve:
            os.posix_fallocate(reserve.fileno(), 0, RESERVE_BYTES)
        described = self._services.base_models.describe(prepared.base)
        base = ensure_base(described, self._services.settings.cache_path)
        return TrainOrder(
            job_id=self._leased.job_id,
            epoch=self._lease.epoch,
            base=BaseOnDisk(
                path=base,
                digest=described.digest,
                name=described.name,
                revision=described.revision,
                fp16=described.fp16,
            ),
            rows=self._attempts.fetch(prepared.rows, self._directory / "rows.jsonl"),
            directory=self._directory,
            resume_from=self._attempts.restore(self._lease, self._directory / "restored"),
            start_from=self._services.adapters.on_disk(prepared.start) if prepared.start else None,
            spec=prepared.ordered,
            schedule=prepared.schedule,
            resident_limit=prepared.resident_limit,
        )

    # The child.

    def _run_child(self, order: TrainOrder, watch: Watch, results: Results) -> Watch:
        """The whole life of a child. On return it has ended and its memory is free."""
        child = self._start_child()
        try:
            child.begin(order)
            self._follow(child, watch, results)
            watch.status = child.wait()
        finally:
            child.kill()
        return watch

    def _follow(self, child: Child, watch: Watch, results: Results) -> None:
        """Until the child's output ends: write what it reports, and pass commands on."""
        while True:
            if self._heartbeat.lost.is_set():
                raise self._lost()
            if (full := self._heartbeat.full) is not None:
                raise full
            self._command(child, watch)
            try:
                event = child.next(timeout=0.2)
            except Empty:
                self._flush(watch, soon=False)
                continue
            if event is None:
                self._flush(watch, soon=True)
                return
            self._handle(event, watch, results)

    def _command(self, child: Child, watch: Watch) -> None:
        """Tell the child to stop or to pause; kill it if it does not in time."""
        command: str | None = None
        if self._heartbeat.status is JobStatus.CANCELLING:
            command, patience = "stop", GRACE
        elif self._heartbeat.status is JobStatus.PAUSING or self._leaving.is_set():
            command, patience = "pause", LEAVE_SECONDS
        if command is not None and command != watch.asked:
            watch.asked, watch.kill_at = command, time.monotonic() + patience
            child.send(ChildCommand.model_validate({"command": command}))
        if watch.kill_at is not None and time.monotonic() > watch.kill_at:
            watch.kill_at = None
            child.kill()

    def _handle(self, event: ChildEvent, watch: Watch, results: Results) -> None:
        match event:
            case UpdateMetrics():
                watch.add(event)
                self._flush(watch, soon=False)
            case EvaluationFinished():
                self._flush(watch, soon=True)
                self._retry(lambda: self._attempts.evaluated(self._lease, event))
            case CheckpointWritten():
                self._flush(watch, soon=True)
                manifest = results.manifest(event)
                self._retry(lambda: self._attempts.checkpoint(self._lease, event, manifest))
                shutil.rmtree(event.path, ignore_errors=True)  # only now: the child may be several checkpoints ahead
            case TrainingStarted():
                self._started(event, results)
            case LogMessage():
                data = dict(event.data)
                self._retry(lambda: self._attempts.add_event(self._lease, "log", event.message, event.level, data))
            case TrainingFinished() | TrainingFailed():
                watch.last = event

    def _started(self, event: TrainingStarted, results: Results) -> None:
        results.environment = Environment(device=event.device, precision=event.precision, threads=event.threads)
        message = f"{event.precision} on {event.device}, {event.trainable_parameters:,} trainable parameters"
        data = event.model_dump(exclude={"event"})
        self._retry(lambda: self._attempts.add_event(self._lease, "training", message, data=data))

    def _flush(self, watch: Watch, *, soon: bool) -> None:
        now = time.monotonic()
        if not watch.batch or (not soon and now - watch.flushed_at < FLUSH_SECONDS):
            return
        last = watch.batch[-1]
        self._retry(lambda: self._attempts.record(self._lease, watch.batch, watch.eta(last)))
        watch.reservation.set_expected_end(watch.ends_in(last))
        watch.batch, watch.flushed_at = [], now

    # The end.

    def _conclude(self, watch: Watch, results: Results) -> None:
        match watch.last:
            case TrainingFinished(outcome="succeeded", adapter=Path() as adapter) as finished:
                self._retry(lambda: self._attempts.warn(self._lease, finished.warnings))
                self._retry(lambda: results.publish(finished, adapter))
                log.info("attempt_published", job=self._leased.job_id)
            case TrainingFailed() as failed:
                error = child_error(failed, self._directory)
                self._end(lambda: self._attempts.fail(self._lease, error))
            case TrainingFinished():
                self._release("stopped behind a checkpoint", strike=False)
            case _ if watch.asked is not None:
                self._release("stopped without a checkpoint", strike=False)
            case _:
                ending = f"signal {-watch.status}" if watch.status < 0 else f"exit status {watch.status}"
                self._release(f"the training process died ({ending})", strike=True)
