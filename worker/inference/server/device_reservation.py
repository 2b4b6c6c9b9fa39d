"""Whether the engine may live on its device: asked twice a second; where it may not, it ends until it may again.

Knows the link and whoever grants the place; no HTTP and no database.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from app.domain.ledger import Unavailable
from worker.inference.server.engine_client import EngineClient

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PERIOD = 0.5
PATIENCE = 4.0
"""Seconds that running answers have to end in once the engine must go."""

LOST = Unavailable("inference cannot ask for its place on the device, and had to leave it", None)

UNKNOWN = 15.0
"""Seconds after which to ask again where nobody knows when the job will be done."""


class DeviceReservation(Protocol):
    """The engine's place on the device, which each `stay` keeps for `lease` seconds. Called in a thread."""

    lease: float

    def stay(self) -> Unavailable | None:
        """Reserve the place, or keep it; or why there must be no engine."""
        ...

    def leave(self) -> None:
        """Give the place back: the engine has ended."""
        ...


class FixedReservation:
    """A place that is given and taken by hand: for a front without a database, and for tests."""

    def __init__(self, absence: Unavailable | None = None, lease: float = math.inf) -> None:
        self.absence = absence
        self.lease = lease
        self.held = False

    def stay(self) -> Unavailable | None:
        """What it was told."""
        self.held = self.held or self.absence is None
        return self.absence

    def leave(self) -> None:
        """Note that the place is free."""
        self.held = False


class ReservationKeeper:
    """Has the engine rest and wake as its tenancy says. It rests until the tenancy has said that it may live."""

    def __init__(self, link: EngineClient, tenancy: DeviceReservation) -> None:
        self._link = link
        self._tenancy = tenancy
        self._asking = ThreadPoolExecutor(1, "tenancy")  # of its own: it must not wait behind models that are resolved
        self._holds = False
        link.refuse("inference waits for its place on the device", 0.0)

    async def run(self) -> None:
        """Until cancelled. Who grants the place may be away for as long as it was granted; then others may have it."""
        kept = time.monotonic()
        while True:
            try:
                absence = await self._ask(self._tenancy.stay)
                kept = time.monotonic()
                await self._follow(absence)
            except Exception:
                log.exception("the place on the device could not be asked for")
                if self._holds and time.monotonic() - kept > self._tenancy.lease:
                    await self._follow(LOST)
            await asyncio.sleep(PERIOD)

    async def leave(self) -> None:
        """Give the place back at the end; where that fails, it runs out."""
        try:
            await self._ask(self._tenancy.leave)
        except Exception:
            log.exception("the place on the device could not be given back")

    async def _ask(self, what: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._asking, what)

    async def _follow(self, absence: Unavailable | None) -> None:
        if absence is None:
            self._holds = True
            self._link.wake()
            return
        self._link.refuse(absence.reason, UNKNOWN if absence.retry_after is None else absence.retry_after)
        if self._holds:
            await self._link.rest(PATIENCE)
            self._holds = False
            await self.leave()
