"""The prefix cache: KV snapshots of finished sequences, restored instead of computed again.

A lookup compares tokens instead of hashing blocks, and takes the longest common prefix to the token (decision 13). Only
sequences of the same served model are compared. The cache is bounded in bytes and evicts the least recently used.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from worker.inference.cache.kv_cache import Snapshot

MIN_NEW_TOKENS = 8
"""A sequence is stored only if it adds at least this many tokens to a stored one."""


@dataclass(frozen=True)
class PrefixMatch:
    """A stored sequence whose first `length` tokens are those of the prompt."""

    length: int
    snapshot: Snapshot
    entry: int


@dataclass(frozen=True)
class _StoredPrefix:
    model: Hashable
    token_ids: torch.Tensor  # [length], int32
    snapshot: Snapshot
    num_bytes: int


class PrefixCache:
    """An LRU over (served model, tokens) with a budget in bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: OrderedDict[int, _StoredPrefix] = OrderedDict()
        self._by_model: defaultdict[Hashable, set[int]] = defaultdict(set)
        self._next_entry = 0
        self.num_bytes = 0

    def match(self, model: Hashable, token_ids: list[int]) -> PrefixMatch | None:
        """The stored sequence of this model with the longest common prefix; None if nothing is shared."""
        prompt = torch.tensor(token_ids, dtype=torch.int32)
        best, best_length = -1, 0
        for key in self._by_model.get(model, ()):
            length = _common_prefix(self._entries[key].token_ids, prompt)
            if length > best_length:
                best, best_length = key, length
        if best < 0:
            return None
        self._entries.move_to_end(best)
        return PrefixMatch(best_length, self._entries[best].snapshot, best)

    def worth_storing(self, model: Hashable, token_ids: list[int]) -> bool:
        """Whether storing this sequence would save a later prompt more than a few tokens."""
        match = self.match(model, token_ids)
        return len(token_ids) - (match.length if match else 0) >= MIN_NEW_TOKENS

    def store(self, model: Hashable, token_ids: list[int], snapshot: Snapshot) -> None:
        """Store a sequence, unless it alone exceeds the budget. It replaces a stored one that it extends."""
        num_bytes = sum(keys.nbytes + values.nbytes for keys, values in snapshot)
        if num_bytes > self._budget:
            return
        match = self.match(model, token_ids)
        if match and match.length == len(self._entries[match.entry].token_ids):
            self._evict(match.entry)
        entry = _StoredPrefix(model, torch.tensor(token_ids, dtype=torch.int32), snapshot, num_bytes)
        self._entries[self._next_entry] = entry
        self._by_model[model].add(self._next_entry)
        self._next_entry += 1
        self.num_bytes += num_bytes
        while self.num_bytes > self._budget:
            self._evict(next(iter(self._entries)))

    def _evict(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.num_bytes -= entry.num_bytes
        self._by_model[entry.model].discard(key)
        if not self._by_model[entry.model]:
            del self._by_model[entry.model]


def _common_prefix(one: torch.Tensor, other: torch.Tensor) -> int:
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
