"""The life of one attempt, for every kind of job: lease, prepare, start the child, watch, publish or let go.

The supervisor is the only writer of rows and blobs and knows no tensors; the child owns those and nothing else.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import Empty

import structlog

from app.composition import Services
from app.domain.adapters import Environment, Manifest, ManifestBase
from app.domain.attempts import (
    BaseOnDisk,
    Checkpointed,
    ChildEvent,
    Command,
    Evaluated,
    Failed,
    Finished,
    Log,
    Metrics,
    Started,
    TrainOrder,
)
from app.domain.errors import LeaseLostError, VerituneError
from app.domain.jobs import JobError, JobStatus, Metric
from app.domain.tuning_methods import servable_by
from app.queue.base import kinds_of
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.bases import ensure_base
from worker.child import GRACE, SPARE_BYTES, Spares
from worker.device_reservation import NotReserved, TrainingReservation
from worker.event_file import NAME, write_event_file
from worker.heartbeat import Heartbeat
from worker.watch import Watch

MODULES = {"train": "worker.training"}
"""Kind of job → the module whose process does its work."""

FLUSH_SECONDS = 1.0
METRICS_AT_ONCE = 1_000
LEAVE_SECONDS = 45.0
"""How long a child may take to write its checkpoint when this worker is told to go."""

log = structlog.get_logger(__name__)


class Supervisor:
    """One slot. `owner` names this incarnation of the process, so that an earlier one is never mistaken for it."""

    def __init__(self, services: Services, owner: str, queues: tuple[str, ...]) -> None:
        self._services = services
        self._attempts = services.attempts
        self._owner = owner
        self._kinds = tuple(kind for kind in kinds_of(queues) if kind in MODULES)
        self._leaving = threading.Event()
        self._spares = Spares()

    def warm_up(self) -> None:
        """Have the next job's process wait for it, with all that it imports. Only between jobs.

        It reserves nothing: it goes where what others have reserved leaves it no room, and a job's own bytes count it.
        """
        if self._leaving.is_set() or not self._services.settings.warm_start:
            return
        room = self._services.devices.room(self._services.settings.worker_name)
        if room is not None and room < SPARE_BYTES:
            self.dismiss()
            return
        for kind in self._kinds:
            self._spares.keep(MODULES[kind])

    def dismiss(self) -> None:
        """End what waits for a job that this worker will not take."""
        self._spares.dismiss()

    def leave(self) -> None:
        """SIGTERM: checkpoint what runs, put it back into the queue, take nothing more."""
        self._leaving.set()

    def work(self) -> bool:
        """Lease the next job that this worker may take, and run it. False when there was none."""
        if self._leaving.is_set() or not self._kinds:
            return False
        leased = self._attempts.lease(self._kinds, self._owner)
        if leased is None:
            return False
        directory = self._services.settings.work_path / leased.job_id / str(leased.lease.epoch)
        log.info("attempt_began", job=leased.job_id, epoch=leased.lease.epoch)
        shutil.rmtree(directory.parent, ignore_errors=True)  # of an attempt that was killed on this host
        try:
            with Heartbeat(self._attempts, leased.lease) as heartbeat:
                self._attempt(leased, directory, heartbeat)
        except LeaseLostError:
            log.warning("lease_lost", job=leased.job_id, epoch=leased.lease.epoch)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # another attempt at it has begun here
                directory.parent.rmdir()
        return True

    def _attempt(self, leased: Leased, directory: Path, heartbeat: Heartbeat) -> None:
        try:
            prepared = self._attempts.prepare(leased, self._services.settings.worker_name)
            order = self._order(leased, prepared, directory)
        except LeaseLostError:
            raise
        except VerituneError as error:
            hint = error.problems[0].hint if error.problems else None
            self._attempts.fail(leased.lease, JobError(code=error.code, message=error.detail, hint=hint))
            return
        reservation = TrainingReservation(self._services, leased, prepared, heartbeat)
        try:
            with reservation.acquired(self._leaving):
                watch = self._run(leased, prepared, order, reservation, heartbeat)
        except NotReserved as reason:
            self._attempts.release(leased.lease, str(reason), strike=False)
            return
        self._keep_artifacts(leased, directory / "artifacts")
        self._conclude(leased, prepared, watch)

    def _run(
        self,
        leased: Leased,
        prepared: Prepared,
        order: TrainOrder,
        reservation: TrainingReservation,
        heartbeat: Heartbeat,
    ) -> Watch:
        """The whole life of a child: when this returns, it has given its memory back."""
        watch = Watch(self._spares.take(MODULES[leased.kind]), reservation, prepared.seconds_an_update)
        try:
            watch.child.begin(order.model_dump_json())
            self._watch(leased, prepared, watch, heartbeat)
            watch.status = watch.child.wait()
        finally:
            watch.child.kill()
        return watch

    def _order(self, leased: Leased, prepared: Prepared, directory: Path) -> TrainOrder:
        directory.mkdir(parents=True, exist_ok=True)
        described = self._services.base_models.describe(prepared.base)
        base = ensure_base(described, self._services.settings.cache_path)
        rows = self._attempts.fetch(prepared.rows, directory / "rows.jsonl")
        resume = self._attempts.restore(leased.lease, directory / "restored")
        return TrainOrder(
            job_id=leased.job_id,
            epoch=leased.lease.epoch,
            base=BaseOnDisk(
                path=base,
                digest=described.digest,
                name=described.name,
                revision=described.revision,
                fp16=described.fp16,
            ),
            rows=rows,
            directory=directory,
            resume_from=resume,
            start_from=self._services.adapters.on_disk(prepared.start) if prepared.start else None,
            spec=prepared.ordered,
            schedule=prepared.schedule,
        )

    def _watch(self, leased: Leased, prepared: Prepared, watch: Watch, heartbeat: Heartbeat) -> None:
        """Until the child's output ends: write what it tells, and pass the user's wishes on."""
        while True:
            if heartbeat.lost.is_set():
                watch.child.kill()
                raise LeaseLostError(f"{leased.job_id} was taken over")
            self._pass_on(watch, heartbeat.status)
            try:
                event = watch.child.next(timeout=0.2)
            except Empty:
                self._flush(leased, watch, soon=False)
                continue
            if event is None:
                self._flush(leased, watch, soon=True)
                return
            self._hear(leased, prepared, watch, event)

    def _pass_on(self, watch: Watch, status: JobStatus) -> None:
        wish: str | None = None
        if status is JobStatus.CANCELLING:
            wish, patience = "stop", GRACE
        elif status is JobStatus.PAUSING or self._leaving.is_set():
            wish, patience = "pause", LEAVE_SECONDS
        if wish is not None and wish != watch.asked:
            watch.asked, watch.kill_at = wish, time.monotonic() + patience
            watch.child.tell(Command.model_validate({"command": wish}))
        if watch.kill_at is not None and time.monotonic() > watch.kill_at:
            watch.kill_at = None
            watch.child.kill()

    def _hear(self, leased: Leased, prepared: Prepared, watch: Watch, event: ChildEvent) -> None:
        match event:
            case Metrics():
                watch.heard(event)
                self._flush(leased, watch, soon=False)
            case Evaluated():
                self._flush(leased, watch, soon=True)
                self._attempts.evaluated(leased.lease, event)
            case Checkpointed():
                self._flush(leased, watch, soon=True)
                manifest = self._manifest(leased, prepared, watch, event)
                self._attempts.checkpoint(leased.lease, event, manifest)
                shutil.rmtree(event.path, ignore_errors=True)  # only now: the child may be several checkpoints ahead
            case Started():
                watch.environment = Environment(device=event.device, precision=event.precision, threads=event.threads)
                what = f"{event.precision} on {event.device}, {event.trainable_parameters:,} trainable parameters"
                data = event.model_dump(exclude={"event"})
                self._attempts.tell(leased.lease, "training", what, data=data)
            case Log():
                self._attempts.tell(leased.lease, "log", event.message, event.level, dict(event.data))
            case Finished() | Failed():
                watch.last = event

    def _flush(self, leased: Leased, watch: Watch, *, soon: bool) -> None:
        now = time.monotonic()
        if not watch.batch or (not soon and now - watch.flushed_at < FLUSH_SECONDS):
            return
        last = watch.batch[-1]
        self._attempts.record(leased.lease, watch.batch, watch.eta(last))
        watch.reservation.set_expected_end(watch.ends_in(last))
        watch.batch, watch.flushed_at = [], now

    def _conclude(self, leased: Leased, prepared: Prepared, watch: Watch) -> None:
        match watch.last:
            case Finished(outcome="succeeded", adapter=Path() as adapter):
                self._attempts.warn(leased.lease, watch.last.warnings)
                manifest = self._manifest(leased, prepared, watch, watch.last)
                self._services.adapters.publish(leased.lease, leased.name, adapter, manifest)
                self._remember_pace(prepared, watch.last)
                log.info("attempt_published", job=leased.job_id)
            case Failed() as failed:
                error = JobError(code=failed.code, message=failed.message, hint=failed.hint)
                self._attempts.fail(leased.lease, error)
            case Finished():
                self._attempts.release(leased.lease, "stopped behind a checkpoint", strike=False)
            case _ if watch.asked is not None:
                self._attempts.release(leased.lease, "stopped without a checkpoint", strike=False)
            case _:
                ending = f"signal {-watch.status}" if watch.status < 0 else f"exit status {watch.status}"
                self._attempts.release(leased.lease, f"the training process died ({ending})", strike=True)

    def _keep_artifacts(self, leased: Leased, directory: Path) -> None:
        """Store what the child left for the user, and the metrics of all attempts for TensorBoard."""
        try:
            directory.mkdir(exist_ok=True)
            write_event_file(self._all_metrics(leased), self._began(leased), directory / NAME)
            for path in sorted(directory.iterdir()):
                self._services.artifacts.put(leased.lease, path)
        except LeaseLostError:
            raise
        except Exception:  # hours of training must not be lost for a log of them
            log.exception("artifacts_lost", job=leased.job_id)
            self._attempts.tell(leased.lease, "artifacts_lost", "the job's artifacts could not be stored", "warning")

    def _began(self, leased: Leased) -> float:
        began = self._services.jobs.get(leased.job_id).started_at
        return began.timestamp() if began else 0.0

    def _all_metrics(self, leased: Leased) -> Iterator[Metric]:
        after, more = 0, True
        while more:
            found, more = self._services.jobs.metrics(leased.job_id, after, METRICS_AT_ONCE)
            yield from found
            after = found[-1].update if found else after

    def _remember_pace(self, prepared: Prepared, finished: Finished) -> None:
        """For plans of later jobs: what this device made of this base."""
        if pace := finished.metrics.get("tokens_per_second"):
            served = self._services.base_models.served_digest(prepared.base, prepared.spec.quantization)
            self._services.devices.measured(self._services.settings.worker_name, served, pace)

    def _manifest(self, leased: Leased, prepared: Prepared, watch: Watch, made: Finished | Checkpointed) -> Manifest:
        spec = prepared.spec
        return Manifest(
            job_id=leased.job_id,
            kind="full" if spec.adapter is None else "peft",
            base=ManifestBase(
                name=prepared.base.name,
                revision=self._services.base_models.describe(prepared.base).revision,
                digest=prepared.base.digest,
            ),
            quantization=spec.quantization.model_dump() if spec.quantization else None,
            spec=spec.model_dump(mode="json"),
            dataset_digest=prepared.dataset.digest,
            dataset_rows=prepared.summary.trained,
            protected_share=prepared.plan.protected_share,
            format=spec.format().model_dump(),
            max_sequence_length=prepared.limit,
            seed=spec.seed,
            metrics=made.metrics,
            warnings=made.warnings,
            packages=made.packages,
            environment=watch.environment,
            code_revision=version("veritune"),
            servable_by=servable_by(spec.adapter),
            created_at=datetime.now(UTC),
        )
