"""Keys and values of the sequences that decode together, preallocated; and the two forwards that use them.

A row is a sequence, filled from the left; its length is the caller's to remember. The store stands in for
transformers' own cache, so any causal architecture runs on it unchanged. Knows no requests and no sampling.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from worker.inference.forwards import Forward

BLOCK = 32  # attention over a multiple of 32 positions gives a row the same bits alone and in company
GROWTH = 256
CHUNK = 256
"""Tokens of a prompt that one forward reads."""

CPU = torch.device("cpu")

Snapshot = list[tuple[torch.Tensor, torch.Tensor]]


class _Window:
    """Where the next forward writes and what it reads; one for all layers."""

    rows: slice = slice(0, 0)
    columns: slice | torch.Tensor = slice(0, 0)
    visible: int = 0


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its subclass hook is untyped
    """One layer's keys and values, each [rows, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        self.window = window
        self.rows = self.capacity = 0
        self.stores: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions; return all visible ones of the window's rows."""
        self.lazy_initialization(key_states, value_states)
        keys, values = self.stores
        return self._write(keys, key_states), self._write(values, value_states)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on first use, when shapes and precision are known."""
        if not self.stores:
            self.stores = [_store(state, self.rows, self.capacity) for state in (key_states, value_states)]

    def resize(self, rows: int, capacity: int) -> None:
        """Grow, keeping what is there."""
        self.rows, self.capacity = rows, capacity
        for index, old in enumerate(self.stores):
            self.stores[index] = _store(old, rows, capacity)
            self.stores[index][: old.shape[0], :, : old.shape[2]] = old

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never decisive: every forward here brings its own mask."""
        return self.window.visible, 0

    def get_seq_length(self) -> int:
        """Never decisive: every forward here brings its own positions."""
        return 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def _write(self, store: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        window = self.window
        if isinstance(window.columns, slice):
            store[window.rows, :, window.columns] = state
        else:
            store[torch.arange(state.shape[0], device=state.device), :, window.columns] = state[:, :, 0]
        return store[window.rows, :, : window.visible]


class KeyValues:
    """The key-value store of one batch; rows 0 to n-1 are in use, without holes."""

    def __init__(self, layers: int, device: torch.device = CPU) -> None:
        self._device = device
        self._window = _Window()
        self._layers = [_Layer(self._window) for _ in range(layers)]
        self._cache = Cache(layers=[*self._layers])
        self.rows = self.capacity = 0

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row, over all layers; 0 before the first forward."""
        stores = [store for layer in self._layers for store in layer.stores]
        return sum(store.shape[1] * store.shape[3] * store.element_size() for store in stores)

    def sizes_with(self, rows: int, length: int) -> tuple[int, int]:
        """The (rows, capacity) that holding `rows` sequences of `length` positions would take."""
        grown_rows = self.rows if rows <= self.rows else 1 << (rows - 1).bit_length()
        return grown_rows, max(self.capacity, -(-length // GROWTH) * GROWTH)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sequences of up to `length` positions."""
        sizes = self.sizes_with(rows, length)
        if sizes != (self.rows, self.capacity):
            self.rows, self.capacity = sizes
            for layer in self._layers:
                layer.resize(*sizes)

    @torch.inference_mode()
    def prefill(self, forward: Forward, row: int, ids: list[int], start: int) -> torch.Tensor:
        """Read `ids[start:]` into `row`, which holds the positions before; return the last logits [V].

        Runs in chunks, each one forward of a single sequence without padding.
        """
        logits = torch.empty(0)
        for begin in range(start, len(ids), CHUNK):
            end = min(begin + CHUNK, len(ids))
            self._aim(slice(row, row + 1), slice(begin, end), end)
            positions = torch.arange(begin, end, device=self._device)
            mask = torch.arange(self._window.visible, device=self._device) <= positions[:, None]
            tokens = torch.tensor([ids[begin:end]], device=self._device)
            logits = forward(tokens, positions[None], mask[None, None], self._cache)
        return logits[0]

    @torch.inference_mode()
    def decode(self, forward: Forward, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Append a token to each of the first rows, which hold `lengths` positions; return logits [n, V]."""
        columns = torch.tensor(lengths, device=self._device)
        self._aim(slice(0, len(tokens)), columns, max(lengths) + 1)
        mask = torch.arange(self._window.visible, device=self._device) <= columns[:, None]
        ids = torch.tensor(tokens, device=self._device)[:, None]
        return forward(ids, columns[:, None], mask[:, None, None], self._cache)

    @torch.inference_mode()
    def snapshot(self, row: int, length: int) -> Snapshot:
        """A copy of the first `length` positions of a row: keys and values a layer."""
        return [
            (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for keys, values in (layer.stores for layer in self._layers)
        ]

    @torch.inference_mode()
    def restore(self, row: int, snapshot: Snapshot, length: int) -> None:
        """Put the first `length` positions of a snapshot into a row."""
        for layer, (keys, values) in zip(self._layers, snapshot, strict=True):
            layer.lazy_initialization(keys[None], values[None])
            layer.stores[0][row, :, :length] = keys[:, :length]
            layer.stores[1][row, :, :length] = values[:, :length]

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row over another one."""
        for layer in self._layers:
            for store in layer.stores:
                store[target, :, :length] = store[source, :, :length]

    def _aim(self, rows: slice, columns: slice | torch.Tensor, length: int) -> None:
        self._window.rows, self._window.columns = rows, columns
        self._window.visible = -(-length // BLOCK) * BLOCK


def _store(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    # Zeros, not empty: a masked position is multiplied by a weight of 0, and 0 * NaN is NaN.
    return like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
