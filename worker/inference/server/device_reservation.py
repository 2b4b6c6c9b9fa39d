"""The engine's memory on its device, reserved in the ledger. While it cannot be reserved, the engine is suspended."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from app.composition import Services
from app.domain.ledger import Unavailable, inference_bytes
from worker.device import describe_device
from worker.inference.server.engine_client import EngineClient

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RENEW_PERIOD = 0.5
"""Seconds between two calls of `renew`."""

SUSPEND_AFTER = 4.0
"""Grace period for running requests before the engine is suspended, in seconds."""

RENEWALS_PER_LEASE = 4
"""In between, the ledger is only read."""

LAPSED = Unavailable("the device reservation of inference could not be renewed in time, so its engine had to end", None)

DEFAULT_RETRY_AFTER = 15.0
"""Seconds after which to retry if it is unknown when the training job ends."""


class DeviceReservation(Protocol):
    """The engine's reservation, valid for `lease` seconds after each `renew`. Called in a thread."""

    lease: float

    def renew(self) -> Unavailable | None:
        """Reserve the memory, or renew the reservation. Returns why no engine may run, or None."""
        ...

    def release(self) -> None:
        """Release the memory: the engine has ended."""
        ...


class FixedReservation:
    """A reservation that is set by hand: for a server without a database, and for tests."""

    def __init__(self, unavailable: Unavailable | None = None, lease: float = math.inf) -> None:
        self.unavailable = unavailable
        self.lease = lease
        self.is_held = False

    def renew(self) -> Unavailable | None:
        """What was set."""
        self.is_held = self.is_held or self.unavailable is None
        return self.unavailable

    def release(self) -> None:
        """Note that the memory is free."""
        self.is_held = False


class LedgerReservation:
    """A reservation of `bytes` in the ledger. Its owner is named by the server's port, so that a server takes over the
    row of a predecessor that was killed."""

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self.bytes = inference_bytes(settings.inference_memory, describe_device(()).bytes)
        self._ledger = services.ledger
        self._host = settings.host_name
        self._owner = f"{self._host}:inference:{settings.inference_port}"
        self._renew_at = 0.0
        self.lease = self._ledger.inference_lease * (1 - 1 / RENEWALS_PER_LEASE)  # since a call that renewed nothing
        # A thread outlives the task that waited for it: it must not reserve after `release`.
        self._one_at_a_time = threading.Lock()

    def renew(self) -> Unavailable | None:
        """Raises VerituneError if the database is unavailable."""
        with self._one_at_a_time:
            unavailable = self._ledger.inference_unavailable(self._host)
            if unavailable is None and time.monotonic() >= self._renew_at:
                unavailable = self._ledger.reserve_for_inference(self._host, self._owner, self.bytes)
                self._renew_at = time.monotonic() + self._ledger.inference_lease / RENEWALS_PER_LEASE
            if unavailable is not None:
                self._renew_at = 0.0
            return unavailable

    def release(self) -> None:
        """Raises VerituneError if the database is unavailable; the reservation then lapses."""
        with self._one_at_a_time:
            self._ledger.release(self._host, self._owner)
            self._renew_at = 0.0


class ReservationKeeper:
    """Renews the reservation, and suspends or resumes the engine by it. No engine runs before the first renewal."""

    def __init__(self, engine: EngineClient, reservation: DeviceReservation) -> None:
        self._engine = engine
        self._reservation = reservation
        self._thread = ThreadPoolExecutor(1, "reservation")  # its own: it must not wait behind model look-ups
        self._is_held = False
        engine.refuse_requests("inference waits for its device reservation", 0.0)

    async def run(self) -> None:
        """Run until cancelled. If renewals fail for a lease, the engine is suspended: others may have its memory."""
        renewed_at = time.monotonic()
        while True:
            try:
                unavailable = await self._in_thread(self._reservation.renew)
                renewed_at = time.monotonic()
                await self._apply(unavailable)
            except Exception:
                log.exception("the device reservation could not be renewed")
                if self._is_held and time.monotonic() - renewed_at > self._reservation.lease:
                    await self._apply(LAPSED)
            await asyncio.sleep(RENEW_PERIOD)

    async def release(self) -> None:
        """Release the reservation at the end. If that fails, it lapses."""
        try:
            await self._in_thread(self._reservation.release)
        except Exception:
            log.exception("the device reservation could not be released")

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _apply(self, unavailable: Unavailable | None) -> None:
        if unavailable is None:
            self._is_held = True
            self._engine.resume()
            return
        retry_after = DEFAULT_RETRY_AFTER if unavailable.retry_after is None else unavailable.retry_after
        self._engine.refuse_requests(unavailable.reason, retry_after)
        if self._is_held:
            await self._engine.suspend(SUSPEND_AFTER)
            self._is_held = False
            await self.release()
