"""One attempt's run: prepare the order, reserve the device, run the child, write what it reports, end the attempt.

Every fault of store, disk and database inside an attempt ends it with an event and an error in words. A fault that
often passes is retried first.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import TypeVar

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
from app.domain.errors import LeaseLostError, UnavailableError, VerituneError
from app.domain.jobs import JobStatus
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.attempt_error import DISK, TRANSIENT, child_error, job_error, may_pass
from worker.bases import ensure_base
from worker.child import GRACE, Child
from worker.device_reservation import NotReserved, TrainingReservation
from worker.heartbeat import Heartbeat
from worker.results import Results
from worker.watch import Watch

FLUSH_SECONDS = 1.0
LEAVE_SECONDS = 45.0
"""How long a child may take to write its checkpoint if this worker must leave."""

RETRY_SECONDS = 0.5
RETRY_LIMIT = 60.0
"""Seconds for which a call is retried if database or store are away. The child's reports wait in its pipe meanwhile."""

RESERVE_BYTES = 8 << 20
"""Room that is freed for the end of the attempt: database and work directory may share a disk, and both may fill it."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Attempt:
    """For one thread. `directory`: the attempt's own. `leaving` is set when this worker must leave."""

    def __init__(
        self, services: Services, leased: Leased, directory: Path, heartbeat: Heartbeat, leaving: threading.Event
    ) -> None:
        self._services = services
        self._attempts = services.attempts
        self._leased = leased
        self._lease = leased.lease
        self._directory = directory
        self._heartbeat = heartbeat
        self._leaving = leaving

    def run(self, start_child: Callable[[], Child]) -> None:
        """Run to the end of the attempt, whatever that is. Raises LeaseLostError only."""
        try:
            self._run(start_child)
        except LeaseLostError:
            raise
        except NotReserved as reason:
            self._release(str(reason), strike=False)
        except VerituneError as error:
            log.warning("attempt_failed", job=self._leased.job_id, code=error.code, reason=error.detail)
            self._end_broken(error)
        except Exception as error:
            log.exception("attempt_broke", job=self._leased.job_id)
            self._end_broken(error)

    def _run(self, start_child: Callable[[], Child]) -> None:
        prepared = self._retry(lambda: self._attempts.prepare(self._leased, self._services.settings.worker_name))
        order = self._retry(lambda: self._order(prepared))
        reservation = TrainingReservation(self._services, self._leased, prepared, self._heartbeat)
        results = Results(self._services, self._leased, prepared, self._directory)
        with reservation.acquired(self._leaving):
            watch = self._run_child(start_child, order, Watch(reservation, prepared.seconds_an_update), results)
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

    def _run_child(self, start: Callable[[], Child], order: TrainOrder, watch: Watch, results: Results) -> Watch:
        """The whole life of a child. On return it has ended and its memory is free."""
        child = start()
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

    def _release(self, reason: str, *, strike: bool) -> None:
        self._end(lambda: self._attempts.release(self._lease, reason, strike=strike))

    def _end_broken(self, fault: Exception) -> None:
        """Fail the job with the fault, or requeue it if another attempt may succeed."""
        error = job_error(fault, self._directory)
        if may_pass(error):
            self._end(lambda: self._attempts.release(self._lease, error.message, strike=True, error=error))
        else:
            self._end(lambda: self._attempts.fail(self._lease, error))

    def _end(self, write: Callable[[], None]) -> None:
        """Write the end of the attempt, as long as it has its lease. Its files are deleted first, to make room."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._retry(write, TRANSIENT | {DISK}, limit=float("inf"))

    def _retry(self, call: Callable[[], T], codes: frozenset[str] = TRANSIENT, limit: float | None = None) -> T:
        """Call until database and store answer. Raises LeaseLostError, or the fault after `limit` seconds."""
        give_up_at = time.monotonic() + (RETRY_LIMIT if limit is None else limit)
        while True:
            try:
                return call()
            except UnavailableError as error:
                if error.code not in codes or time.monotonic() > give_up_at:
                    raise
                log.warning("retried", job=self._leased.job_id, reason=error.detail)
            if self._heartbeat.lost.wait(RETRY_SECONDS):
                raise self._lost()

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(f"{self._leased.job_id} was taken over")
