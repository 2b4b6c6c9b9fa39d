"""The heartbeat of one attempt: renews its lease and its place on the device from a thread of its own, and hears the
user's wish there."""

import threading

import structlog

from app.domain.errors import LeaseLostError, VerituneError
from app.domain.jobs import JobStatus, Lease
from app.domain.ledger import Held
from app.services.attempts import Attempts

log = structlog.get_logger(__name__)


class Heartbeat:
    """`status` is the job's, as of the last beat. `lost` is set once another attempt may hold the job.

    A database that does not answer is not a lost lease: the beat goes on trying until the lease has run out by this
    host's own clock, when nobody here may rely on it any more.
    """

    def __init__(self, attempts: Attempts, lease: Lease) -> None:
        self._attempts = attempts
        self._lease = lease
        self._held: Held | None = None
        self._beating = threading.Lock()
        self._over = threading.Event()
        self.lost = threading.Event()
        self.status = JobStatus.RUNNING
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{lease.job_id}", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    def hold(self, held: Held | None) -> None:
        """Renew this place with the lease from now on. When it returns, no beat renews an earlier one any more."""
        with self._beating:
            self._held = held

    def _beat(self) -> None:
        period = min(1.0, self._attempts.lease_seconds / 4)
        missed = 0.0
        while not self._over.wait(period):
            try:
                with self._beating:
                    self.status = self._attempts.renew(self._lease, self._held)
                missed = 0.0
            except LeaseLostError:
                self.lost.set()
                return
            except VerituneError as error:
                missed += period
                log.warning("heartbeat_missed", job=self._lease.job_id, reason=error.code)
                if missed > self._attempts.lease_seconds:
                    self.lost.set()
                    return
