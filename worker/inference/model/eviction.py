"""Evicts idle models to make room for another: adapters first, then slots, then bases, an LRU within each kind."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial, reduce

from worker.inference.errors import ModelError, OutOfMemory
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.memory_use import MemoryUse
from worker.inference.sampling_params import ServedModel


class Evictor:
    """Keeps `bases` and their adapters within a budget. `loading`: bytes of the bases that are being loaded."""

    def __init__(self, bases: OrderedDict[str, AdaptedBase], loading: Mapping[str, int], budget: MemoryUse) -> None:
        self._bases, self._loading, self.budget = bases, loading, budget

    @property
    def memory(self) -> MemoryUse:
        """Bytes of bases and adapters, including bases that are being loaded."""
        loading = MemoryUse(sum(self._loading.values()))
        return reduce(MemoryUse.plus, (adapted.memory for adapted in self._bases.values()), loading)

    def missing(self, needed: MemoryUse) -> MemoryUse:
        """Bytes by which `needed` would exceed the budget."""
        if not any(needed):
            return MemoryUse()
        over = self.memory.plus(needed).minus(self.budget)
        return MemoryUse(max(0, over.device), max(0, over.host))

    def make_room(
        self,
        what: str,
        served: ServedModel,
        needed: Callable[[], MemoryUse],
        in_use: Collection[ServedModel],
        bases_in_use: Collection[str],
        *,
        may_evict: bool = True,
    ) -> None:
        """Evict what is idle until `needed` fits. Evicts nothing if that cannot succeed while requests run.

        `needed` is asked again after each eviction. Raises OutOfMemory if it fits only later, ModelError if it never
        does; `what` names it there.
        """
        if not any(self.missing(needed())):
            return
        evictable = list(self._evictable(served, in_use, bases_in_use)) if may_evict else []
        if in_use and not self._suffices(evictable, served, in_use, self.missing(needed())):
            raise OutOfMemory
        while any(missing := self.missing(needed())):
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
        needed = self.budget.plus(missing)
        if missing.device:
            takes = f"{what} takes memory to {needed.device / 1e9:.2f} GB"
            given = f"bases and adapters may have {self.budget.device / 1e9:.2f} GB here (VERITUNE_INFERENCE_MEMORY)"
        else:
            takes = f"{what} takes the host's memory to {needed.host / 1e9:.2f} GB"
            given = f"adapters may have {self.budget.host / 1e9:.2f} GB of it"
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
