"""Loads bases on threads of their own, one at a time, while requests over other bases go on.

Only the reading runs there; everything else happens on the model thread, which collects finished loads between two
steps. Each load has a thread that ends with it: OpenMP keeps a team of threads for every thread that has computed, and
with more threads than cores the model thread's team sleeps after each kernel instead of spinning, which makes a step
half as long again.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock, Thread

from worker.inference.ipc import Generate
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import ServedModel


@dataclass
class PendingLoad:
    """A base that is being loaded, the model it is loaded for, and the requests that wait for it."""

    model: ServedModel
    future: Future[AdaptedBase]
    waiting: list[Generate] = field(default_factory=list)

    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it has ended."""
        return self.future.exception()


class BaseLoader:
    """`on_loaded` is called from the loading thread whenever a load has ended."""

    def __init__(self, models: LoadedModels, on_loaded: Callable[[], None]) -> None:
        self._models = models
        self._on_loaded = on_loaded
        self._one_at_a_time = Lock()
        self._pending: dict[str, PendingLoad] = {}

    @property
    def is_loading(self) -> bool:
        """Whether a load is pending."""
        return bool(self._pending)

    @property
    def has_finished(self) -> bool:
        """Whether `collect_finished` has something to return."""
        return any(load.future.done() for load in self._pending.values())

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a base."""
        return sum(len(load.waiting) for load in self._pending.values())

    def start(
        self,
        model: ServedModel,
        in_use: Collection[ServedModel] = (),
        bases_in_use: Collection[str] = (),
        *,
        may_evict: bool = True,
    ) -> PendingLoad:
        """The pending load of the model's base, started if there is none. Raises ModelError and OutOfMemory."""
        digest = model.base_digest
        if digest not in self._pending:
            self._models.begin_loading_base(model, in_use, bases_in_use, may_evict=may_evict)
            load = self._pending[digest] = PendingLoad(model, Future())
            load.future.add_done_callback(lambda _: self._on_loaded())
            Thread(target=self._run, args=(load,), name="base-loader", daemon=True).start()
        return self._pending[digest]

    def collect_finished(self) -> list[PendingLoad]:
        """Hand finished bases to the loaded models; return the loads. `error` says which ones failed."""
        finished = [load for load in self._pending.values() if load.future.done()]
        for load in finished:
            del self._pending[load.model.base_digest]
            self._models.finish_loading_base(load.model.base_digest, None if load.error else load.future.result())
        return finished

    def cancel(self, request_id: str) -> None:
        """Let one request wait no longer. The load goes on."""
        for load in self._pending.values():
            load.waiting = [request for request in load.waiting if request.id != request_id]

    def _run(self, load: PendingLoad) -> None:
        with self._one_at_a_time:
            try:
                load.future.set_result(self._models.read_base(load.model))
            except BaseException as error:
                load.future.set_exception(error)
