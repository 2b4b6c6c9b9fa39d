"""The heartbeat of one attempt: a thread that renews its lease and device reservation, and reads the job's status."""

import threading

import structlog

from app.domain.errors import LeaseLostError, StorageError
from app.domain.jobs import JobStatus, Lease
from app.domain.ledger import OwnedReservation
from app.services.attempts import Attempts

log = structlog.get_logger(__name__)


class Heartbeat:
    """`status`: the job's, as of the last beat. `lost` is set once another attempt may have the job.

    `full`: the fault of a database whose disk is full. No retry helps until the attempt frees its room.

    If the database does not answer, the heartbeat retries until the lease has expired by this host's clock. Only then
    is the lease lost.
    """

    def __init__(self, attempts: Attempts, lease: Lease) -> None:
        self._attempts = attempts
        self._lease = lease
        self._reservation: OwnedReservation | None = None
        self._beating = threading.Lock()
        self._over = threading.Event()
        self.lost = threading.Event()
        self.full: StorageError | None = None
        self.status = JobStatus.RUNNING
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{lease.job_id}", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    def set_reservation(self, reservation: OwnedReservation | None) -> None:
        """Renew this reservation with the lease from now on. When this returns, no beat renews an earlier one."""
        with self._beating:
            self._reservation = reservation

    def _beat(self) -> None:
        period = min(1.0, self._attempts.lease_seconds / 4)
        missed = 0.0
        while not self._over.wait(period):
            try:
                with self._beating:
                    self.status = self._attempts.renew(self._lease, self._reservation)
                missed, self.full = 0.0, None
            except LeaseLostError:
                self.lost.set()
                return
            except Exception as error:  # this thread must not end while the attempt runs
                self.full = error if isinstance(error, StorageError) else None
                missed += period
                log.warning("heartbeat_missed", job=self._lease.job_id, reason=str(error))
                if missed > self._attempts.lease_seconds:
                    self.lost.set()
                    return
