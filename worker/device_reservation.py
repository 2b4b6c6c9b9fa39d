"""A job's reservation of this host's device: acquired before its process starts, released when that has ended.

If the device has no room for job and inference at once, acquiring waits until the inference engine has stopped.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.composition import Services
from app.domain.errors import LeaseLostError, UnavailableError, VerituneError
from app.domain.jobs import JobStatus
from app.domain.ledger import OwnedReservation, Tenant, TrainingGrant
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.device import describe_device
from worker.heartbeat import Heartbeat

ASK_SECONDS = 0.25
PATIENCE = 60.0
"""Seconds beyond inference's lease that a job waits for inference to release the device. Stopping the engine takes
about five. The lease of a killed inference server expires by then. One that still renews is at fault."""

BEGINNING = 10.0
"""Seconds from the start of a job to its first update, about. Added to the plan's duration of the training."""

log = structlog.get_logger(__name__)


class NotReserved(Exception):
    """The device was not reserved. The message is for the job's events."""


class TrainingReservation:
    """The device reservation of one attempt. For one thread."""

    def __init__(self, services: Services, leased: Leased, prepared: Prepared, heartbeat: Heartbeat) -> None:
        self._services = services
        self._ledger = services.ledger
        self._leased = leased
        self._prepared = prepared
        self._heartbeat = heartbeat
        self._reservation: OwnedReservation | None = None

    @contextmanager
    def acquired(self, leaving: threading.Event) -> Iterator[None]:
        """Reserve the device while the block runs. Raises NotReserved if the job cannot run now, and LeaseLostError."""
        try:
            self._acquire(leaving)
            yield
        finally:
            self._heartbeat.set_reservation(None)
            try:
                self._ledger.release(self._host, self._owner)
            except VerituneError as error:
                log.warning(
                    "reservation_not_released", job=self._leased.job_id, reason=error.detail
                )  # its lease expires

    def set_expected_end(self, seconds: float) -> None:
        """Write in how many seconds the job should end. Suspended inference sends it as Retry-After."""
        if self._reservation is None:
            return
        try:
            self._ledger.set_expected_end(self._reservation, seconds)
        except VerituneError as error:  # an estimate is not worth the attempt
            log.warning("expected_end_not_written", job=self._leased.job_id, reason=error.detail)

    @property
    def _host(self) -> str:
        return self._services.settings.host_name

    @property
    def _owner(self) -> str:
        return self._leased.lease.owner

    def _acquire(self, leaving: threading.Event) -> None:
        began = time.monotonic()
        reserved_at: float | None = None  # inference is asked to stop from then on
        reported: frozenset[Tenant] = frozenset()
        while (grant := self._ask_until_answered(leaving)).blocked_by:
            reserved_at = None if grant.reservation is None else reserved_at or time.monotonic()
            if grant.blocked_by != reported:
                self._report_blocked(grant)
                reported = grant.blocked_by
            if reserved_at is not None and time.monotonic() - reserved_at > self._ledger.inference_lease + PATIENCE:
                raise NotReserved("inference did not release the device")
            self._wait(leaving)
        if reported:
            waited = round(time.monotonic() - began, 1)
            self._tell(f"the device is free; waited {waited} s", {"seconds": waited})

    def _ask_until_answered(self, leaving: threading.Event) -> TrainingGrant:
        """The ledger's answer. While the ledger is away, the attempt retries as long as it has its lease."""
        while True:
            try:
                return self._ask()
            except UnavailableError as error:
                log.warning("ledger_away", job=self._leased.job_id, reason=error.detail)
            self._wait(leaving)

    def _ask(self) -> TrainingGrant:
        planned = self._prepared.plan.seconds
        seconds = None if planned is None else planned + BEGINNING
        grant = self._ledger.reserve_for_training(
            self._host, self._owner, self._leased.job_id, self._prepared.need.bytes, self._size, seconds
        )
        if grant.reservation != self._reservation:
            self._reservation = grant.reservation
            self._heartbeat.set_reservation(grant.reservation)
        return grant

    @property
    def _size(self) -> int:
        """Bytes of the device: reported by this worker, or measured if it has not reported yet."""
        own = self._services.devices.find(self._services.settings.worker_name)
        return own.bytes if own else describe_device(self._services.settings.queues).bytes

    def _wait(self, leaving: threading.Event) -> None:
        """Wait for `ASK_SECONDS`. Raises if the attempt must not wait any longer."""
        if self._heartbeat.lost.is_set():
            raise LeaseLostError(f"{self._leased.job_id} was taken over")
        if self._heartbeat.status is not JobStatus.RUNNING or leaving.is_set():
            raise NotReserved("stopped while waiting for the device")
        leaving.wait(ASK_SECONDS)

    def _report_blocked(self, grant: TrainingGrant) -> None:
        blocker = "inference" if Tenant.INFERENCE in grant.blocked_by else "another job"
        size = grant.reservation.reservation.bytes if grant.reservation else None
        self._tell(
            f"waiting for {blocker} to release the device; policy {grant.policy}",
            {"policy": grant.policy.value, "bytes": size},
        )

    def _tell(self, message: str, data: dict[str, str | float | None]) -> None:
        try:
            self._services.attempts.add_event(self._leased.lease, "device", message, data=data)
        except UnavailableError as error:
            log.warning("event_not_written", job=self._leased.job_id, message=message, reason=error.detail)
