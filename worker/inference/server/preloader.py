"""What will probably be asked for next is loaded while the engine has nothing else to do. Knows no HTTP."""

import asyncio
import logging
from typing import Protocol

from worker.inference.protocol import ServedModel
from worker.inference.server.engine_client import EngineClient

log = logging.getLogger(__name__)

PERIOD = 2.0  # seconds


class PreloadSource(Protocol):
    """Who can tell. Called in a thread."""

    def expected(self) -> list[ServedModel]:
        """The models, most probable first."""
        ...


class Preloader:
    """Tells each engine once of each model. One that had just to be started anew is told nothing: it may have died of
    what it was told."""

    def __init__(self, link: EngineClient, expectations: PreloadSource) -> None:
        self._link = link
        self._expectations = expectations
        self._told: set[str] = set()
        self._life = 0

    async def run(self) -> None:
        """Until cancelled. Whoever can tell may be away: the engine loads on demand, too."""
        while True:
            if self._link.ready and not self._link.shaky:
                try:
                    self._tell(await asyncio.to_thread(self._expectations.expected))
                except Exception as error:
                    log.warning("nobody knows what will be asked for: %s", error)
            await asyncio.sleep(PERIOD)

    def _tell(self, models: list[ServedModel]) -> None:
        if self._link.starts != self._life:
            self._life = self._link.starts
            self._told.clear()
        for model in models:
            if model.digest not in self._told:
                self._told.add(model.digest)
                self._link.expect(model)
