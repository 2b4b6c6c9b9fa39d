"""One attempt at a job: what all kinds have in common. It runs the job, and ends it whatever happens.

Every fault of store, disk and database inside an attempt ends it with an event and an error in words. A fault that
often passes is retried first.
"""

import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from app.composition import Services
from app.domain.errors import LeaseLostError, UnavailableError, VerituneError
from app.domain.jobs import JobStatus
from app.services.attempts import Leased
from worker.attempt_error import DISK, TRANSIENT, job_error, may_pass
from worker.device_reservation import NotReserved
from worker.heartbeat import Heartbeat

RETRY_SECONDS = 0.5
RETRY_LIMIT = 60.0
"""Seconds for which a call is retried if database or store are away. A child's reports wait in its pipe meanwhile."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Attempt(ABC):
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

    def run(self) -> None:
        """Run to the end of the attempt, whatever that is. Raises LeaseLostError only."""
        try:
            self._run()
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

    @abstractmethod
    def _run(self) -> None:
        """Do the job, and end it. Raises VerituneError for a fault that ends the attempt."""

    def _must_stop(self) -> bool:
        """Whether the user or this worker's end stops the attempt. Raises LeaseLostError, or the heartbeat's fault."""
        if self._heartbeat.lost.is_set():
            raise self._lost()
        if self._heartbeat.full is not None:
            raise self._heartbeat.full
        return self._leaving.is_set() or self._heartbeat.status in (JobStatus.CANCELLING, JobStatus.PAUSING)

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
