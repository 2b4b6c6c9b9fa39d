"""Bases are read beside the thread that answers, one at a time, so that those over other bases go on meanwhile.

Everything but the reading itself happens on that thread, which takes in what was read between two steps. Each reading
has a thread that ends with it. OpenMP keeps threads for every one that has computed, and while there are more of them
than cores, those beside the thread that answers sleep after each kernel instead of spinning: a step takes half as long
again.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock, Thread

from worker.inference.ipc import Generate
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.protocol import ServedModel


@dataclass
class PendingLoad:
    """One base on its way, for a model over it, and the requests that wait for it."""

    model: ServedModel
    future: Future[AdaptedBase]
    waiting: list[Generate] = field(default_factory=list)

    @property
    def error(self) -> BaseException | None:
        """Why it could not be read, once it has ended."""
        return self.future.exception()


class BaseLoader:
    """Calls `wake`, from another thread, when a base has been read."""

    def __init__(self, models: LoadedModels, wake: Callable[[], None]) -> None:
        self._models = models
        self._wake = wake
        self._one_at_a_time = Lock()
        self._under_way: dict[str, PendingLoad] = {}

    @property
    def busy(self) -> bool:
        """Whether a base is on its way."""
        return bool(self._under_way)

    @property
    def has_news(self) -> bool:
        """Whether `take_in` has something to say."""
        return any(reading.future.done() for reading in self._under_way.values())

    @property
    def waiting(self) -> int:
        """How many requests wait for a base."""
        return sum(len(reading.waiting) for reading in self._under_way.values())

    def fetch(self, model: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str]) -> PendingLoad:
        """Have the base of `model` read, if it is not on its way. Raises ModelError and OutOfMemory."""
        digest = model.base_digest
        if digest not in self._under_way:
            self._models.make_way(model, in_use, bases_in_use)
            reading = self._under_way[digest] = PendingLoad(model, Future())
            reading.future.add_done_callback(lambda _: self._wake())
            Thread(target=self._read, args=(reading,), name="reader", daemon=True).start()
        return self._under_way[digest]

    def take_in(self) -> list[PendingLoad]:
        """What has ended since: its base is there now, or `error` says why not."""
        ended = [reading for reading in self._under_way.values() if reading.future.done()]
        for reading in ended:
            del self._under_way[reading.model.base_digest]
            self._models.take(reading.model.base_digest, None if reading.error else reading.future.result())
        return ended

    def cancel(self, request_id: str) -> None:
        """One request waits no longer."""
        for reading in self._under_way.values():
            reading.waiting = [request for request in reading.waiting if request.id != request_id]

    def _read(self, reading: PendingLoad) -> None:
        with self._one_at_a_time:
            try:
                reading.future.set_result(self._models.read(reading.model))
            except BaseException as error:
                reading.future.set_exception(error)
