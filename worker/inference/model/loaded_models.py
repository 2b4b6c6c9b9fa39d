"""The bases and adapters in memory: loaded on demand, evicted least recently used first, within a budget of bytes."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path

from worker.inference.errors import ModelError, OutOfMemory
from worker.inference.ipc import EngineSettings
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.base import Base, compute_device, compute_dtype, load_base
from worker.inference.model.memory_use import MemoryUse, base_memory, budget
from worker.inference.model.transformers_forward import Forward
from worker.inference.sampling_params import ServedModel


class LoadedModels:
    """All loaded models. Only the engine's model thread uses it, except for `read_base`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.device = compute_device(settings)
        self.dtype = compute_dtype(settings, self.device)
        self._budget = budget(settings, self.device).models
        self._bases: OrderedDict[str, AdaptedBase] = OrderedDict()
        self._loading: dict[str, int] = {}  # bytes by base digest

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
        loading = MemoryUse(sum(self._loading.values()))
        return reduce(MemoryUse.plus, (adapted.memory for adapted in self._bases.values()), loading)

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
                self._make_room(what, served, lambda: size, in_use, bases_in_use, may_evict=may_evict)

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
        self._make_room(what, served, lambda: needed, in_use, bases_in_use, may_evict=may_evict)
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
            self._make_room(f"an adapter slot for {served.digest}", served, needed, in_use, bases_in_use)

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

    def _missing(self, needed: MemoryUse) -> MemoryUse:
        """Bytes by which `needed` would exceed the budget."""
        if not any(needed):
            return MemoryUse()
        over = self.memory.plus(needed).minus(self._budget)
        return MemoryUse(max(0, over.device), max(0, over.host))

    def _make_room(
        self,
        what: str,
        served: ServedModel,
        needed: Callable[[], MemoryUse],
        in_use: Collection[ServedModel],
        bases_in_use: Collection[str],
        *,
        may_evict: bool = True,
    ) -> None:
        """Evict what is idle until `needed` fits. Evicts nothing if that cannot succeed while others run."""
        if not any(self._missing(needed())):
            return
        evictable = list(self._evictable(served, in_use, bases_in_use)) if may_evict else []
        if in_use and not self._suffices(evictable, served, in_use, self._missing(needed())):
            raise OutOfMemory
        while any(missing := self._missing(needed())):
            helpful = next((entry for entry in evictable if any(map(min, entry[0], missing))), None)
            if helpful is not None:
                evictable.remove(helpful)
                helpful[1]()
            elif in_use or self._loading or not may_evict or set(bases_in_use) - {served.base_digest}:
                raise OutOfMemory
            else:
                raise ModelError(self._never_fits(what, missing))

    def _suffices(
        self,
        evictable: Sequence[tuple[MemoryUse, Callable[[], None]]],
        served: ServedModel,
        in_use: Collection[ServedModel],
        missing: MemoryUse,
    ) -> bool:
        freed = reduce(MemoryUse.plus, (size for size, _ in evictable), MemoryUse())
        adapted = self._bases.get(served.base_digest)
        if adapted is not None and not {model.digest for model in in_use} & adapted.loaded.keys():
            freed = freed.minus(adapted.slots_memory)  # evicted slots of this base would be needed again
        return max(missing.minus(freed)) <= 0

    def _never_fits(self, what: str, missing: MemoryUse) -> str:
        needed = self._budget.plus(missing)
        if missing.device:
            takes = f"{what} takes memory to {needed.device / 1e9:.2f} GB"
            given = f"bases and adapters may have {self._budget.device / 1e9:.2f} GB here (VERITUNE_INFERENCE_MEMORY)"
        else:
            takes = f"{what} takes the host's memory to {needed.host / 1e9:.2f} GB"
            given = f"adapters may have {self._budget.host / 1e9:.2f} GB of it"
        return f"{takes}; {given}"

    def _evictable(
        self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str]
    ) -> Iterator[tuple[MemoryUse, Callable[[], None]]]:
        """What may be evicted for `served`, the cheapest to load again first: its size, and the call that evicts it."""
        used = {model.digest for model in in_use}
        shared = [adapted for adapted in self._bases.values() if not adapted.adapter_owns_base]
        for adapted in shared:
            for digest in [digest for digest in adapted.loaded if digest not in {*used, served.digest}]:
                yield adapted.adapter_sizes[digest], partial(adapted.evict_adapter, digest)
        for adapted in shared:
            if not used & adapted.loaded.keys():
                yield adapted.slots_memory, adapted.free_slots
        kept = {*bases_in_use, *(model.base_digest for model in in_use), served.base_digest}
        for digest in [digest for digest in self._bases if digest not in kept]:
            yield self._bases[digest].base_memory, partial(self._evict_base, digest)

    def _evict_base(self, digest: str) -> None:
        del self._bases[digest]
        gc.collect()  # a model and its PEFT wrapper refer to each other


def _adapter_of(served: ServedModel) -> str | None:
    return served.digest if served.adapter_path else None
