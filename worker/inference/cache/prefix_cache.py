"""Finished sequences' keys and values, kept to be read again instead of computed again.

A sequence is found by its longest common prefix with a new prompt, among those of the same served model only.
Bounded in bytes, least recently used out first. Knows no model.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from worker.inference.cache.kv_cache import Snapshot

MIN_GAIN = 8  # a sequence that adds less to one already kept is not worth a copy of its own


@dataclass(frozen=True)
class Match:
    """A kept sequence that shares its first `length` tokens with the one asked for."""

    length: int
    snapshot: Snapshot
    key: int


@dataclass(frozen=True)
class _Entry:
    model: Hashable
    tokens: torch.Tensor
    snapshot: Snapshot
    size: int


class PrefixCache:
    """An LRU over (served model, tokens) with a budget in bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_model: defaultdict[Hashable, set[int]] = defaultdict(set)
        self._next = 0
        self.size = 0

    def find(self, model: Hashable, tokens: list[int]) -> Match | None:
        """The kept sequence of this model with the longest common prefix, or None when nothing is shared."""
        wanted = torch.tensor(tokens, dtype=torch.int32)
        best, best_length = -1, 0
        for key in self._by_model.get(model, ()):
            length = _common(self._entries[key].tokens, wanted)
            if length > best_length:
                best, best_length = key, length
        if best < 0:
            return None
        self._entries.move_to_end(best)
        return Match(best_length, self._entries[best].snapshot, best)

    def worth_keeping(self, model: Hashable, tokens: list[int]) -> bool:
        """Whether keeping this sequence would save a later prompt more than a few tokens."""
        match = self.find(model, tokens)
        return len(tokens) - (match.length if match else 0) >= MIN_GAIN

    def keep(self, model: Hashable, tokens: list[int], snapshot: Snapshot) -> None:
        """Remember a sequence, unless it alone is beyond the budget; one that it extends is replaced by it."""
        size = sum(keys.nbytes + values.nbytes for keys, values in snapshot)
        if size > self._budget:
            return
        match = self.find(model, tokens)
        if match and match.length == len(self._entries[match.key].tokens):
            self._drop(match.key)
        entry = _Entry(model, torch.tensor(tokens, dtype=torch.int32), snapshot, size)
        self._entries[self._next] = entry
        self._by_model[model].add(self._next)
        self._next += 1
        self.size += size
        while self.size > self._budget:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.size -= entry.size
        self._by_model[entry.model].discard(key)
        if not self._by_model[entry.model]:
            del self._by_model[entry.model]


def _common(one: torch.Tensor, other: torch.Tensor) -> int:
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
