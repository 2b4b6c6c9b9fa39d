"""The stores of keys and values that groups have, within one budget. Knows no models and decides on no turns."""

from collections.abc import Iterable

import torch

from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.batch import Batch
from worker.inference.engine.sequence import RequestError
from worker.inference.ipc import Generate
from worker.inference.model.base import Base


class KVCachePool:
    """`budget`: bytes for all of them."""

    def __init__(self, budget: int, device: torch.device) -> None:
        self._budget, self._device = budget, device
        self._none = KVCache(0, device)
        self._position_bytes: dict[str, int] = {}
        self._rested: tuple[str, KVCache] | None = None

    def admit(self, request: Generate, base: Base) -> None:
        """Whether the request, whose prompt is in tokens, would fit alone. Raises RequestError."""
        self._position_bytes[base.digest] = base.position_bytes
        length = _length(request)
        if (needed := self._bytes(base.digest, *self._none.sizes_with(1, length))) > self._budget:
            raise RequestError(
                f"The keys and values of {length} tokens take {needed / 1e9:.2f} GB here, and may have "
                f"{self._budget / 1e9:.2f} GB (VERITUNE_INFERENCE_MEMORY). Shorten the prompt or lower max_tokens.",
                "prompt",
            )

    def have_room(self, group: Batch, groups: Iterable[Batch]) -> bool:
        """Whether all stay within their budget when the next request of `group`, one of the `groups`, joins it."""
        store = group.store or self._none
        wanted = store.sizes_with(len(group.seated) + 1, _length(group.next))
        others = sum(
            self._bytes(other.base_digest, other.store.rows, other.store.capacity)
            for other in groups
            if other is not group and other.store is not None
        )
        return self._bytes(group.base_digest, *wanted) + others <= self._budget

    def seat(self, group: Batch, request: Generate, base: Base) -> KVCache:
        """The group's store, with a row more for the request."""
        if group.store is None:
            group.store = self._new(base, _length(request))
        group.store.reserve(len(group.seated) + 1, _length(request))
        return group.store

    def rest(self, group: Batch) -> None:
        """Keep the store of a group that is done for another one over its base: what was recorded there is of use."""
        if group.store is not None and len(group.store.recordings):
            self._rested = group.base_digest, group.store

    def _new(self, base: Base, length: int) -> KVCache:
        """An empty one; or the rested one where that is over the same base, no longer than a new one and within the
        budget."""
        fresh = KVCache(base.layers, self._device)
        rested, self._rested = self._rested, None
        if rested is not None and rested[0] == base.digest:
            rows, capacity = rested[1].sizes_with(1, length)
            fits = self._bytes(base.digest, rows, capacity) <= self._budget
            if fits and capacity == fresh.sizes_with(1, length)[1]:
                return rested[1]
        return fresh

    def _bytes(self, base_digest: str, rows: int, capacity: int) -> int:
        return rows * capacity * self._position_bytes[base_digest]


def _length(request: Generate) -> int:
    """In tokens, when its answer is as long as it may be."""
    return len(request.prompt) + request.sampling.max_tokens
