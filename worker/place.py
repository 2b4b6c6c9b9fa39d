"""A job's place on this host's device: asked for before its process begins, given back when that has ended.

Where inference cannot stay beside the job, taking the place means waiting until its engine has ended.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.composition import Services
from app.domain.errors import LeaseLostError, UnavailableError, VerituneError
from app.domain.jobs import JobStatus
from app.domain.ledger import Held, Standing, Tenant
from app.services.attempts import Leased
from app.services.plans import Prepared
from worker.device import describe_device
from worker.heartbeat import Heartbeat

ASK_SECONDS = 0.25
PATIENCE = 60.0
"""Seconds beyond inference's lease that a job waits for it to make way. It takes five; a front that was killed makes
way when its lease runs out; one that renews and stays is at fault."""

BEGINNING = 10.0
"""About what a job takes until its first update begins; added to what the plan says of the training."""

log = structlog.get_logger(__name__)


class GivenUp(Exception):
    """The place was not taken; the reason is for the job's log."""


class Place:
    """What one attempt has of the device. For one thread."""

    def __init__(self, services: Services, leased: Leased, prepared: Prepared, heartbeat: Heartbeat) -> None:
        self._services = services
        self._ledger = services.ledger
        self._leased = leased
        self._prepared = prepared
        self._heartbeat = heartbeat
        self._held: Held | None = None

    @contextmanager
    def taken(self, leaving: threading.Event) -> Iterator[None]:
        """Hold the place while the block runs. Raises GivenUp when the job is not to run now, and LeaseLostError."""
        try:
            self._take(leaving)
            yield
        finally:
            self._heartbeat.hold(None)
            try:
                self._ledger.release(self._host, self._owner)
            except VerituneError as error:
                log.warning("place_not_released", job=self._leased.job_id, reason=error.detail)  # its lease runs out

    def expect(self, seconds: float) -> None:
        """Say in how many seconds the job should be done: inference tells those who ask when to come back."""
        if self._held is None:
            return
        try:
            self._ledger.expect(self._held, seconds)
        except VerituneError as error:  # the job goes on, and is done when it is done
            log.warning("end_not_told", job=self._leased.job_id, reason=error.detail)

    @property
    def _host(self) -> str:
        return self._services.settings.host_name

    @property
    def _owner(self) -> str:
        return self._leased.lease.owner

    def _take(self, leaving: threading.Event) -> None:
        began = time.monotonic()
        reserved: float | None = None  # when: only from then on is inference asked to go
        told: frozenset[Tenant] = frozenset()
        while (standing := self._asked(leaving)).waits_for:
            reserved = None if standing.held is None else reserved or time.monotonic()
            if standing.waits_for != told:
                self._tell_of_waiting(standing)
                told = standing.waits_for
            if reserved is not None and time.monotonic() - reserved > self._ledger.inference_lease + PATIENCE:
                raise GivenUp("inference did not make way")
            self._wait(leaving)
        if told:
            waited = round(time.monotonic() - began, 1)
            self._tell(f"the device is free; waited {waited} s", {"seconds": waited})

    def _asked(self, leaving: threading.Event) -> Standing:
        """What the ledger says, once it can be reached: until then the attempt waits on, as long as it is its own."""
        while True:
            try:
                return self._ask()
            except UnavailableError as error:
                log.warning("place_not_asked_for", job=self._leased.job_id, reason=error.detail)
            self._wait(leaving)

    def _ask(self) -> Standing:
        planned = self._prepared.plan.seconds
        seconds = None if planned is None else planned + BEGINNING
        standing = self._ledger.train(
            self._host, self._owner, self._leased.job_id, self._prepared.need.bytes, self._size, seconds
        )
        if standing.held != self._held:
            self._held = standing.held
            self._heartbeat.hold(standing.held)
        return standing

    @property
    def _size(self) -> int:
        """Bytes of the device: what this worker reported, or where it has not yet, what it would."""
        own = self._services.devices.find(self._services.settings.worker_name)
        return own.bytes if own else describe_device(self._services.settings.queues).bytes

    def _wait(self, leaving: threading.Event) -> None:
        """A moment; raises when there is no reason to wait on."""
        if self._heartbeat.lost.is_set():
            raise LeaseLostError(f"{self._leased.job_id} was taken over")
        if self._heartbeat.status is not JobStatus.RUNNING or leaving.is_set():
            raise GivenUp("stopped while it waited for the device")
        leaving.wait(ASK_SECONDS)

    def _tell_of_waiting(self, standing: Standing) -> None:
        what = "inference makes way" if Tenant.INFERENCE in standing.waits_for else "another job has the device"
        size = standing.held.reservation.bytes if standing.held else None
        self._tell(f"{what}; policy {standing.policy}", {"policy": standing.policy.value, "bytes": size})

    def _tell(self, message: str, data: dict[str, str | float | None]) -> None:
        try:
            self._services.attempts.tell(self._leased.lease, "device", message, data=data)
        except UnavailableError as error:
            log.warning("not_told", job=self._leased.job_id, message=message, reason=error.detail)
