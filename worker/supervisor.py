"""One slot of a worker: lease a job, run one attempt at it, and keep a process ready for the next.

The supervisor is the only writer of rows and blobs. It knows no tensors: those are the child's.
"""

import contextlib
import shutil
import threading
from pathlib import Path

import structlog

from app.composition import Services
from app.domain.errors import LeaseLostError
from app.domain.specs import JobKind
from app.queue.base import kinds_of
from app.services.attempts import Leased
from worker.attempt import Attempt
from worker.child import SPARE_BYTES, Spares
from worker.evaluation_attempt import EvaluationAttempt
from worker.heartbeat import Heartbeat
from worker.synthesis_attempt import SynthesisAttempt
from worker.training_attempt import TrainingAttempt

TRAINING_CHILD = "worker.training"
"""The module that a training job's child process runs."""

KINDS = frozenset({JobKind.TRAIN, JobKind.EVALUATE, JobKind.SYNTHESIZE, JobKind.REGROUND})
"""The kinds of job that a worker can run."""

log = structlog.get_logger(__name__)


class Supervisor:
    """`owner` names this start of the process, so that an earlier one is never mistaken for it."""

    def __init__(self, services: Services, owner: str, queues: tuple[str, ...]) -> None:
        self._services = services
        self._owner = owner
        self._kinds = tuple(kind for kind in kinds_of(queues) if kind in KINDS)
        self._leaving = threading.Event()
        self._spares = Spares()

    def warm_up(self) -> None:
        """Start the next job's process, which imports its libraries and waits. Call it only between jobs.

        The process reserves nothing: it ends if reservations leave it no room, and a job's own bytes include it.
        """
        if self._leaving.is_set() or not self._services.settings.warm_start:
            return
        room = self._services.devices.room(self._services.settings.worker_name)
        if room is not None and room < SPARE_BYTES:
            self.dismiss()
            return
        if JobKind.TRAIN in self._kinds:
            self._spares.keep(TRAINING_CHILD)

    def dismiss(self) -> None:
        """End the processes that wait for a job."""
        self._spares.dismiss()

    def leave(self) -> None:
        """On SIGTERM: write a checkpoint of the running job, requeue it, and lease no other."""
        self._leaving.set()

    def work(self) -> bool:
        """Lease the next job that this worker may run, and run it. False if there was none."""
        if self._leaving.is_set() or not self._kinds:
            return False
        leased = self._services.attempts.lease(self._kinds, self._owner)
        if leased is None:
            return False
        directory = self._services.settings.work_path / leased.job_id / str(leased.lease.epoch)
        log.info("attempt_began", job=leased.job_id, epoch=leased.lease.epoch)
        shutil.rmtree(directory.parent, ignore_errors=True)  # of an attempt that was killed on this host
        try:
            with Heartbeat(self._services.attempts, leased.lease) as heartbeat:
                self._attempt(leased, directory, heartbeat).run()
        except LeaseLostError:
            log.warning("lease_lost", job=leased.job_id, epoch=leased.lease.epoch)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # another attempt at it has begun here
                directory.parent.rmdir()
        return True

    def _attempt(self, leased: Leased, directory: Path, heartbeat: Heartbeat) -> Attempt:
        if leased.kind == JobKind.EVALUATE:
            return EvaluationAttempt(self._services, leased, directory, heartbeat, self._leaving)
        if leased.kind in (JobKind.SYNTHESIZE, JobKind.REGROUND):
            return SynthesisAttempt(self._services, leased, directory, heartbeat, self._leaving)
        return TrainingAttempt(
            self._services, leased, directory, heartbeat, self._leaving, lambda: self._spares.take(TRAINING_CHILD)
        )
