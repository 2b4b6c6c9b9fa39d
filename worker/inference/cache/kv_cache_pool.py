"""The KV caches of all batches, within one budget of bytes."""

from collections.abc import Collection, Hashable
from typing import NamedTuple

import torch

from worker.inference.cache.kv_cache import KVCache


class KVShape(NamedTuple):
    """What a base's KV cache is made of: `position_bytes` is one position of one sequence over all layers."""

    base_digest: str
    num_layers: int
    position_bytes: int


class _PooledCache(NamedTuple):
    shape: KVShape
    cache: KVCache

    @property
    def bytes(self) -> int:
        return _bytes(self.shape, self.cache.num_rows, self.cache.capacity)


class KVCachePool:
    """Allocates one KV cache for each batch, by the batch's key. `budget` is in bytes."""

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget, self._device = budget, device
        self._empty = KVCache(0, device)
        self._entries: dict[Hashable, _PooledCache] = {}
        self._retired: _PooledCache | None = None

    def bytes_alone(self, shape: KVShape, length: int) -> int:
        """The bytes of one sequence of `length` positions in a cache of its own."""
        return _bytes(shape, *self._empty.size_for(1, length))

    def try_allocate(self, key: Hashable, shape: KVShape, num_rows: int, length: int) -> KVCache | None:
        """The batch's cache, with room for `num_rows` sequences of up to `length` positions; None if all caches
        together would exceed the budget."""
        entry = self._entries.get(key)
        wanted = (entry.cache if entry else self._empty).size_for(num_rows, length)
        others = sum(other.bytes for name, other in self._entries.items() if name != key)
        if _bytes(shape, *wanted) + others > self.budget:
            return None
        cache = entry.cache if entry else self._new(shape, length)
        self._entries[key] = _PooledCache(shape, cache)  # before it grows: an allocation may fail halfway
        cache.reserve(num_rows, length)
        return cache

    def release(self, keys: Collection[Hashable]) -> None:
        """Free the caches of these batches."""
        for key in keys:
            self._entries.pop(key, None)

    def retire(self, key: Hashable) -> None:
        """Free a finished batch's cache, but keep it for the next batch over its base if it has captured graphs."""
        entry = self._entries.pop(key, None)
        if entry is not None and len(entry.cache.graphs):
            self._retired = entry

    def _new(self, shape: KVShape, length: int) -> KVCache:
        """The retired cache if it suits: the same base, no longer than a new one would be, and within the budget."""
        retired, self._retired = self._retired, None
        if retired is not None and retired.shape.base_digest == shape.base_digest:
            rows, capacity = retired.cache.size_for(1, length)
            suits = capacity == self._empty.size_for(1, length)[1]
            if suits and _bytes(shape, rows, capacity) <= self.budget:
                return retired.cache
        return KVCache(shape.num_layers, self._device)


def _bytes(shape: KVShape, num_rows: int, capacity: int) -> int:
    return num_rows * capacity * shape.position_bytes
