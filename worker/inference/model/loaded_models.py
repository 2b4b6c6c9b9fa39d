"""Which models are in memory: bases and the adapters over them, loaded on demand and dropped by LRU.

Knows no requests.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path

from worker.inference.cache.kv_cache import Forward
from worker.inference.ipc import EngineSettings
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.base import Base, ModelError, OutOfMemory, compute_device, compute_dtype, load_base
from worker.inference.model.memory_use import (
    MemoryUse,
    adapter_bytes,
    adapter_memory,
    base_bytes,
    budget,
    has_llama_forward,
)
from worker.inference.protocol import ServedModel


class LoadedModels:
    """All that is loaded, within a budget of bytes. Not for several threads, but for `read`: the engine's model thread
    owns it."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.device = compute_device(settings)
        self.dtype = compute_dtype(settings, self.device)
        self._budget = budget(settings, self.device).models
        self._bases: OrderedDict[str, AdaptedBase] = OrderedDict()
        self._coming: dict[str, int] = {}

    @property
    def bases(self) -> int:
        """How many bases are loaded."""
        return len(self._bases)

    @property
    def adapters(self) -> int:
        """How many adapters are loaded, over all bases."""
        return sum(len(adapted.loaded) for adapted in self._bases.values())

    @property
    def bytes(self) -> MemoryUse:
        """What bases and adapters take, those that are being read included."""
        return reduce(
            MemoryUse.plus, (adapted.bytes for adapted in self._bases.values()), MemoryUse(sum(self._coming.values()))
        )

    def has_base(self, served: ServedModel) -> bool:
        """Whether the base of `served` is in memory."""
        return served.base_digest in self._bases

    def has_room(self, served: ServedModel) -> bool:
        """Whether `served` could be loaded without anything else having to go."""
        adapted = self._bases.get(served.base_digest)
        wanted = MemoryUse() if adapted else self._size_of_base(served)
        if served.adapter_path is not None and (adapted is None or served.digest not in adapted.loaded):
            wanted = wanted.plus(self._size_of_adapter(served))
        return not any(self._missing(wanted))

    def has_places(
        self,
        served: ServedModel,
        beside: Collection[ServedModel] | None,
        in_use: Collection[ServedModel],
        bases_in_use: Collection[str] = (),
    ) -> bool:
        """Whether `load` and `make_places` would succeed, as far as that is known before."""
        adapted = self._bases.get(served.base_digest)
        if adapted is None:
            return True
        others = [_adapter(model) for model in beside or ()]
        if _adapter(served) in (None, *adapted.loaded):
            wanted = MemoryUse() if beside is None else adapted.growth([*others, _adapter(served)])
        else:
            wanted = self._size_of_adapter(served)
            if beside is not None:
                wanted = wanted.plus(adapted.growth_with(sum(wanted), others))
        missing = self._missing(wanted)
        if not any(missing):
            return True
        freed = reduce(MemoryUse.plus, (freed for freed, _ in self._idle(served, in_use, bases_in_use)), MemoryUse())
        if not {model.digest for model in in_use} & adapted.loaded.keys():
            freed = freed.less(adapted.places)  # these would have to be made anew
        return max(missing.less(freed)) <= 0

    def load(self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str] = ()) -> Base:
        """Have `served` in memory, and say what its base is.

        What was used least recently goes to make room, adapters before bases; what `in_use` and `bases_in_use` name
        never does. Raises ModelError, and OutOfMemory where it has to wait for those.
        """
        if not self.has_base(served):
            self.make_way(served, in_use, bases_in_use)
            found = None
            try:
                found = self.read(served)
            finally:
                self.take(served.base_digest, found)
        self._bases.move_to_end(served.base_digest)
        adapted = self._bases[served.base_digest]
        if served.adapter_path is not None and served.digest not in adapted.loaded:

            def make_room(held: MemoryUse) -> None:
                self._make_room(f"adapter {served.digest}", served, lambda: held, in_use, bases_in_use)

            adapted.load(served.digest, Path(served.adapter_path), self._settings.max_rank, make_room)
        return adapted.base

    def make_places(
        self,
        served: ServedModel,
        beside: Collection[ServedModel] | None,
        in_use: Collection[ServedModel],
        bases_in_use: Collection[str] = (),
    ) -> None:
        """Have room for `served`, which is loaded, to be computed `beside` the others of its batch, or alone for None.
        Raises as `load` does."""
        if beside is None:
            return
        adapted, rows = self._bases[served.base_digest], [_adapter(model) for model in [*beside, served]]
        self._make_room(f"a place for {served.digest}", served, lambda: adapted.growth(rows), in_use, bases_in_use)
        adapted.promise(rows)

    def lane(self, served: ServedModel) -> Hashable:
        """What the models of one batch have in common. `served` is loaded."""
        mixes = self._bases[served.base_digest].mixes(_adapter(served))
        return served.base_digest if mixes else (served.base_digest, _adapter(served))

    def forward(self, rows: Sequence[ServedModel], *, alone: bool = False) -> Forward:
        """The forward of a batch whose rows answer as these models, which are loaded and of one lane. `alone`: there is
        one row, to be computed in shapes that depend on nobody else."""
        adapted = self._bases[rows[0].base_digest]
        # A base that another thread brings to the GPU meanwhile, and a recording, would spoil each other.
        return adapted.forward([_adapter(model) for model in rows], alone=alone, may_record=not self._coming)

    def make_way(
        self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str] = ()
    ) -> None:
        """Have room for the base of `served`, which counts as there until `take`. Raises as `load` does."""
        wanted = self._size_of_base(served)
        self._make_room(f"base model {served.base_digest}", served, lambda: wanted, in_use, bases_in_use)
        self._coming[served.base_digest] = wanted.device

    def read(self, served: ServedModel) -> AdaptedBase:
        """The base of `served`, from its directory. May be called on another thread. Raises ModelError."""
        return AdaptedBase(load_base(served, self.device, self.dtype))

    def take(self, base_digest: str, adapted: AdaptedBase | None) -> None:
        """What was made way for is there; or, for None, will not come."""
        del self._coming[base_digest]
        if adapted is not None:
            self._bases[base_digest] = adapted

    def _size_of_base(self, served: ServedModel) -> MemoryUse:
        return MemoryUse(base_bytes(served, self.device, self.dtype))

    def _size_of_adapter(self, served: ServedModel) -> MemoryUse:
        """Before it is known how it will be served."""
        size = adapter_bytes(served, self.dtype)
        return adapter_memory(size, self.device) if has_llama_forward(served.base_path) else MemoryUse(size)

    def _missing(self, wanted: MemoryUse) -> MemoryUse:
        """How much of that there is no room for."""
        if not any(wanted):
            return MemoryUse()
        over = self.bytes.plus(wanted).less(self._budget)
        return MemoryUse(max(0, over.device), max(0, over.host))

    def _make_room(
        self,
        what: str,
        served: ServedModel,
        wanted: Callable[[], MemoryUse],
        in_use: Collection[ServedModel],
        bases: Collection[str],
    ) -> None:
        """Drop what is idle, but nothing of `served`, until what is `wanted` fits."""
        idle = self._idle(served, in_use, bases)
        while any(missing := self._missing(wanted())):
            way = next((drop for freed, drop in idle if any(map(min, freed, missing))), None)
            if way is not None:
                way()
            elif in_use or self._coming or set(bases) - {served.base_digest}:
                raise OutOfMemory
            else:
                raise ModelError(self._refusal(what, missing))

    def _refusal(self, what: str, missing: MemoryUse) -> str:
        needed = self._budget.plus(missing)
        if missing.device:
            takes = f"{what} takes memory to {needed.device / 1e9:.2f} GB"
            given = f"bases and adapters may have {self._budget.device / 1e9:.2f} GB here (VERITUNE_INFERENCE_MEMORY)"
        else:
            takes = f"{what} takes the host's memory to {needed.host / 1e9:.2f} GB"
            given = f"adapters may have {self._budget.host / 1e9:.2f} GB of it"
        return f"{takes}; {given}"

    def _idle(
        self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str]
    ) -> Iterator[tuple[MemoryUse, Callable[[], None]]]:
        """What may go for `served`, the cheapest first: how much it takes, and the way to drop it."""
        used = {model.digest for model in in_use}
        shared = [adapted for adapted in self._bases.values() if not adapted.is_alone]
        for adapted in shared:
            for digest in [digest for digest in adapted.loaded if digest not in {*used, served.digest}]:
                yield adapted.sizes[digest], partial(adapted.drop, digest)
        for adapted in shared:
            if not used & adapted.loaded.keys():
                yield adapted.places, adapted.clear_places
        kept = {*bases_in_use, *(model.base_digest for model in in_use), served.base_digest}
        for digest in [digest for digest in self._bases if digest not in kept]:
            yield self._bases[digest].bare, partial(self._drop_base, digest)

    def _drop_base(self, digest: str) -> None:
        del self._bases[digest]
        gc.collect()  # modules and their PEFT wrapper refer to each other


def _adapter(served: ServedModel) -> str | None:
    return served.digest if served.adapter_path else None
