"""The bases and adapters in memory: loaded on demand, evicted least recently used first, within a budget of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path

from worker.inference.ipc import EngineSettings
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.base import Base, compute_device, compute_dtype, load_base
from worker.inference.model.eviction import Evictor
from worker.inference.model.memory_use import MemoryUse, base_memory, budget
from worker.inference.model.transformers_forward import Forward
from worker.inference.sampling_params import ServedModel


class LoadedModels:
    """All loaded models. Only the engine's model thread uses it, except for `read_base`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.device = compute_device(settings)
        self.dtype = compute_dtype(settings, self.device)
        self._bases: OrderedDict[str, AdaptedBase] = OrderedDict()
        self._loading: dict[str, int] = {}  # bytes by base digest
        self._evictor = Evictor(self._bases, self._loading, budget(settings, self.device).models)

    @property
    def num_bases(self) -> int:
        """Loaded bases."""
        return len(self._bases)

    @property
    def num_adapters(self) -> int:
        """Loaded adapters, over all bases."""
        return sum(len(adapted.loaded) for adapted in self._bases.values())

    @property
    def memory(self) -> MemoryUse:
        """Bytes of bases and adapters, including bases that are being loaded."""
        return self._evictor.memory

    def has_base(self, served: ServedModel) -> bool:
        """Whether the base of `served` is in memory."""
        return served.base_digest in self._bases

    def load(
        self,
        served: ServedModel,
        in_use: Collection[ServedModel] = (),
        bases_in_use: Collection[str] = (),
        *,
        may_evict: bool = True,
    ) -> Base:
        """Load `served`, base and adapter, unless it is in memory; return its base.

        Evicts what was used least recently, adapters before bases, but nothing that `in_use` or `bases_in_use` name.
        Raises OutOfMemory if it fits only after running requests have finished, ModelError if it never fits or is
        broken.
        """
        if not self.has_base(served):
            self.begin_loading_base(served, in_use, bases_in_use, may_evict=may_evict)
            loaded = None
            try:
                loaded = self.read_base(served)
            finally:
                self.finish_loading_base(served.base_digest, loaded)
        self._bases.move_to_end(served.base_digest)
        adapted = self._bases[served.base_digest]
        if served.adapter_path is not None and served.digest not in adapted.loaded:

            def make_room(size: MemoryUse) -> None:
                what = f"adapter {served.digest}"
                self._evictor.make_room(what, served, lambda: size, in_use, bases_in_use, may_evict=may_evict)

            adapted.load(served.digest, Path(served.adapter_path), self._settings.max_rank, make_room)
        return adapted.base

    def begin_loading_base(
        self,
        served: ServedModel,
        in_use: Collection[ServedModel] = (),
        bases_in_use: Collection[str] = (),
        *,
        may_evict: bool = True,
    ) -> None:
        """Make room for the base of `served`, and count it until `finish_loading_base`. Raises as `load` does."""
        needed = base_memory(served, self.device, self.dtype)
        what = f"base model {served.base_digest}"
        self._evictor.make_room(what, served, lambda: needed, in_use, bases_in_use, may_evict=may_evict)
        self._loading[served.base_digest] = needed.device

    def read_base(self, served: ServedModel) -> AdaptedBase:
        """Read the base of `served` from its directory. May run on another thread. Raises ModelError."""
        return AdaptedBase(load_base(served, self.device, self.dtype))

    def finish_loading_base(self, base_digest: str, adapted: AdaptedBase | None) -> None:
        """Add the base that `begin_loading_base` made room for; None if it could not be read."""
        del self._loading[base_digest]
        if adapted is not None:
            self._bases[base_digest] = adapted

    def reserve_slots(
        self,
        served: ServedModel,
        running: Collection[ServedModel],
        in_use: Collection[ServedModel],
        bases_in_use: Collection[str] = (),
    ) -> None:
        """Reserve adapter slots for a batch of the `running` models and `served`, which are loaded. Raises as `load`
        does."""
        adapted = self._bases[served.base_digest]

        def make_room(needed: Callable[[], MemoryUse]) -> None:
            self._evictor.make_room(f"an adapter slot for {served.digest}", served, needed, in_use, bases_in_use)

        adapted.reserve_slots([_adapter_of(model) for model in [*running, served]], make_room)

    def batch_key(self, served: ServedModel) -> Hashable:
        """Equal for the models that can share a forward. `served` is loaded."""
        shares = self._bases[served.base_digest].can_share_batch(_adapter_of(served))
        return served.base_digest if shares else (served.base_digest, _adapter_of(served))

    def forward(self, rows: Sequence[ServedModel], *, deterministic: bool = False) -> Forward:
        """The forward of a batch whose rows are of these models, which are loaded and have one batch key.

        `deterministic`: the batch has one row, and its shapes must not depend on other requests.
        """
        adapted = self._bases[rows[0].base_digest]
        # A base that another thread copies to the GPU would spoil a graph capture, and the other way round.
        may_capture = not self._loading
        digests = [_adapter_of(model) for model in rows]
        return adapted.forward(digests, deterministic=deterministic, may_capture=may_capture)


def _adapter_of(served: ServedModel) -> str | None:
    return served.digest if served.adapter_path else None
