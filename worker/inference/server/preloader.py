"""Preloads the models that will probably be used next, while the engine has nothing else to do."""

import asyncio
import logging
from typing import Protocol

from worker.inference.sampling_params import ServedModel
from worker.inference.server.engine_client import EngineClient

log = logging.getLogger(__name__)

PERIOD = 2.0  # seconds


class PreloadSource(Protocol):
    """Knows which models to preload. Called in a thread."""

    def models_to_preload(self) -> list[ServedModel]:
        """The models, most probable first."""
        ...


class Preloader:
    """Sends each engine one preload hint a model. It sends none after a crash: one of them may have caused it."""

    def __init__(self, engine: EngineClient, source: PreloadSource) -> None:
        self._engine = engine
        self._source = source
        self._hinted: set[str] = set()
        self._engine_start = 0

    async def run(self) -> None:
        """Run until cancelled. If the source fails, models are still loaded on demand."""
        while True:
            if self._engine.ready and not self._engine.crashed_recently:
                try:
                    self._send_hints(await asyncio.to_thread(self._source.models_to_preload))
                except Exception as error:
                    log.warning("models to preload could not be looked up: %s", error)
            await asyncio.sleep(PERIOD)

    def _send_hints(self, models: list[ServedModel]) -> None:
        if self._engine.starts != self._engine_start:
            self._engine_start = self._engine.starts
            self._hinted.clear()
        for model in models:
            if model.digest not in self._hinted:
                self._hinted.add(model.digest)
                self._engine.preload(model)
