"""Keys and values of the sequences that decode together, preallocated; and the steps that read and write them.

A row is a sequence, filled from the left; its length is the caller's to remember. The store stands in for
transformers' own cache, so any causal architecture runs on it unchanged. Knows no requests and no sampling.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from worker.inference.cache.cuda_graphs import CudaGraphCache

BLOCK, GROWTH = 32, 256
"""Of how many positions a row has a multiple: where it grows with what it holds, and in what it may take."""

SPARE = 128
"""Positions behind those that are held that rows may have before it is worth copying the others."""

PREFILL_CHUNK_TOKENS = 256
"""Tokens of prompts that one step reads."""

CPU = torch.device("cpu")

Snapshot = list[tuple[torch.Tensor, torch.Tensor]]


class BatchSegment(NamedTuple):
    """Rows of one step that get equally many tokens.

    `tokens`: where theirs stand among the step's, row by row. `at`: the index of their positions in a store, with the
    same columns for all rows or one for each. `mask`: [rows or 1, 1, tokens a row, visible], true where a key is seen.
    `kept`: how many of each row's last tokens have logits that are wanted.
    """

    tokens: slice
    rows: slice
    at: tuple[slice | torch.Tensor, slice, slice | torch.Tensor]
    mask: torch.Tensor
    kept: int

    @property
    def height(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def decodes(self) -> bool:
        """Whether each row has one token, at a position of its own."""
        return isinstance(self.at[0], torch.Tensor)


class ForwardBatch(NamedTuple):
    """What one forward reads: `ids` and `positions` [tokens]; `counts` [rows], the tokens of each row in the order of
    the parts; `wanted`: the places of the tokens behind which logits are, as the parts say."""

    ids: torch.Tensor
    positions: torch.Tensor
    parts: list[BatchSegment]
    counts: torch.Tensor
    wanted: torch.Tensor

    @property
    def reads_nothing(self) -> bool:
        """Whether all rows decode."""
        return all(part.decodes for part in self.parts)


class PrefillChunk(NamedTuple):
    """Tokens of a prompt for `row`, which holds the `start` positions before them. `kept`: how many of the last ones'
    logits are wanted: that of the prompt's last one, at least."""

    row: int
    ids: list[int]
    start: int
    kept: int


class _CacheView:
    """The part that transformers' next forward is about; one for all layers."""

    part: BatchSegment


class LayerKVCache(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its subclass hook is untyped
    """One layer's keys and values: `stores`, each [rows, heads, positions, head_dim], at the start of a `memory` that
    holds `capacity` positions a row."""

    is_sliding = False

    def __init__(self, window: _CacheView) -> None:
        self.window = window
        self.rows = self.capacity = self.positions = 0
        self.memory: list[torch.Tensor] = []
        self.stores: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions, [rows, heads, tokens a row, head_dim]; return all visible ones of the window's
        rows."""
        part = self.window.part
        if part.decodes:
            key_states, value_states = key_states[:, :, 0], value_states[:, :, 0]
        return self.write(part, key_states, value_states)

    def write(self, part: BatchSegment, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The new positions of a part, [rows, heads, tokens a row, head_dim], without the third where rows decode; all
        visible ones of its rows."""
        self.lazy_initialization(keys, values)
        return _written(self.stores[0], part, keys), _written(self.stores[1], part, values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on first use, when shapes and precision are known."""
        if not self.stores:
            self.memory = [_memory(state, self.rows, self.capacity) for state in (key_states, value_states)]
            self.stores = [_laid_out(memory, self.positions) for memory in self.memory]

    def resize(self, rows: int, capacity: int, positions: int) -> None:
        """Grow, keeping what is there: a memory that is larger already, as when there was no room for another layer's
        growth, stays so."""
        self.rows, self.capacity = rows, capacity
        for index, (memory, old) in enumerate(zip(self.memory, self.stores, strict=True)):
            self.memory[index] = _memory(old, max(rows, memory.shape[0]), max(capacity, memory.shape[2]))
            self.stores[index] = _filled(_laid_out(self.memory[index], positions), old)
        self.positions = positions

    def spread(self, positions: int) -> None:
        """Give each row so many positions, and keep what is in them."""
        for index, (memory, old) in enumerate(zip(self.memory, self.stores, strict=True)):
            self.stores[index] = _filled(_laid_out(memory, positions), old[:, :, :positions].clone())
        self.positions = positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never decisive: every forward here brings its own mask."""
        return self.window.part.mask.shape[-1], 0

    def get_seq_length(self) -> int:
        """Never decisive: every forward here brings its own positions."""
        return 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1


class KVCache:
    """The key-value store of one batch; rows 0 to n-1 are in use, without holes.

    There is memory for `capacity` positions a row. On a GPU a row has all of them from the start, because steps are
    recorded; on a CPU as many as the longest one needs, because a product over a part of them would copy it first.
    """

    def __init__(self, layers: int, device: torch.device = CPU) -> None:
        self._device, self._grows = device, device.type == "cpu"
        self._window = _CacheView()
        self.layers = [LayerKVCache(self._window) for _ in range(layers)]
        self.cache = Cache(layers=[*self.layers])
        self.rows = self.capacity = self._positions = 0
        self.recordings = CudaGraphCache()

    def sizes_with(self, rows: int, length: int) -> tuple[int, int]:
        """The (rows, capacity) that holding `rows` sequences of `length` positions would take."""
        grown_rows = self.rows if rows <= self.rows else power_of_two(rows)
        return grown_rows, max(self.capacity, _multiple(GROWTH, length))

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sequences of up to `length` positions."""
        sizes = self.sizes_with(rows, length)
        if sizes != (self.rows, self.capacity):
            self.recordings.clear()  # they read where the positions were
            positions = self._positions if self._grows else sizes[1]
            for layer in self.layers:
                layer.resize(*sizes, positions)
            self.rows, self.capacity = sizes  # now that the memory for all of them is there

    def trim(self, length: int) -> None:
        """No row holds more than `length` positions any longer: leave out what is far beyond. Whoever comes when there
        are none is computed as in a new store."""
        if self._grows and (length == 0 or _multiple(BLOCK, length) + SPARE < self._positions):
            self._spread(length)

    def aim(self, part: BatchSegment) -> Cache:
        """The store as transformers' own cache, for a forward of this part."""
        self._window.part = part
        return self.cache

    @torch.inference_mode()
    def step(
        self, forward: "Forward", tokens: Sequence[int], lengths: Sequence[int], reads: Sequence[PrefillChunk]
    ) -> torch.Tensor:
        """Append a token to each of the first rows, which hold `lengths` positions, and read parts of prompts into
        others. Logits [first rows and what the reads keep, V]. A prompt's part is read without padding."""
        self._extend(max([*(length + 1 for length in lengths), *(read.start + len(read.ids) for read in reads)]))
        parts = [decoding(self._tensor(lengths), self._seen(max(lengths) + 1))] if tokens else []
        at, wanted = len(tokens), list(range(len(tokens)))
        for read in reads:
            parts.append(self._reading(read, at))
            at += len(read.ids)
            wanted += range(at - read.kept, at)
        step = ForwardBatch(
            ids=self._tensor([*tokens, *(token for read in reads for token in read.ids)]),
            positions=self._tensor([*lengths, *(at for r in reads for at in range(r.start, r.start + len(r.ids)))]),
            parts=parts,
            counts=self._tensor([1] * len(tokens) + [len(read.ids) for read in reads]),
            wanted=self._tensor(wanted),
        )
        return forward(step, self)

    def prefill(self, forward: "Forward", row: int, ids: list[int], start: int) -> torch.Tensor:
        """Read `ids[start:]` into `row`, which holds the positions before; return the last logits [V]."""
        logits = torch.empty(0)
        for begin in range(start, len(ids), PREFILL_CHUNK_TOKENS):
            end = min(begin + PREFILL_CHUNK_TOKENS, len(ids))
            logits = self.step(forward, (), (), [PrefillChunk(row, ids[begin:end], begin, int(end == len(ids)))])
        return logits[0]

    def decode(self, forward: "Forward", tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Append a token to each of the first rows, which hold `lengths` positions; return logits [n, V]."""
        return self.step(forward, tokens, lengths, ())

    @torch.inference_mode()
    def snapshot(self, row: int, length: int) -> Snapshot:
        """A copy of the first `length` positions of a row: keys and values a layer."""
        return [
            (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for keys, values in (layer.stores for layer in self.layers)
        ]

    @torch.inference_mode()
    def restore(self, row: int, snapshot: Snapshot, length: int) -> None:
        """Put the first `length` positions of a snapshot into a row."""
        self._extend(length)
        for layer, (keys, values) in zip(self.layers, snapshot, strict=True):
            layer.lazy_initialization(keys[None], values[None])
            layer.stores[0][row, :, :length] = keys[:, :length]
            layer.stores[1][row, :, :length] = values[:, :length]

    @torch.inference_mode()
    def clear(self, row: int, length: int) -> None:
        """Zero the first `length` positions of a row: a NaN there would be seen through the mask by whoever is next."""
        for layer in self.layers:
            for store in layer.stores:
                store[row, :, :length].zero_()

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row over another one."""
        for layer in self.layers:
            for store in layer.stores:
                store[target, :, :length] = store[source, :, :length]

    def _extend(self, length: int) -> None:
        if self._grows and length > self._positions:
            self._spread(length)

    @torch.inference_mode()
    def _spread(self, length: int) -> None:
        self._positions = _multiple(BLOCK, length)
        for layer in self.layers:
            layer.spread(self._positions)

    def _seen(self, length: int) -> int:
        """How many positions a step looks at for rows that hold `length` at most."""
        return self._positions if self._grows else _multiple(GROWTH, length)

    def _reading(self, read: PrefillChunk, at: int) -> BatchSegment:
        end = read.start + len(read.ids)
        seen = torch.arange(self._seen(end), device=self._device)
        mask = seen <= torch.arange(read.start, end, device=self._device)[:, None]
        tokens, row = slice(at, at + len(read.ids)), slice(read.row, read.row + 1)
        return BatchSegment(tokens, row, (row, slice(None), slice(read.start, end)), mask[None, None], read.kept)

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self._device, dtype=torch.long)


Forward = Callable[[ForwardBatch, KVCache], torch.Tensor]
"""A model's: the step's tokens go through it, their keys and values into the store; the wanted logits [wanted, V] come
back in float32."""


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


def decoding(positions: torch.Tensor, visible: int) -> BatchSegment:
    """The first rows, a token each at `positions` [rows], all of which see at most the first `visible` ones."""
    rows = slice(0, len(positions))
    mask = torch.arange(visible, device=positions.device) <= positions[:, None]
    at = torch.arange(len(positions), device=positions.device), slice(None), positions
    return BatchSegment(rows, rows, at, mask[:, None, None], kept=1)


def _written(store: torch.Tensor, part: BatchSegment, state: torch.Tensor) -> torch.Tensor:
    """`state` at the part's positions; the store as far as the part sees it."""
    store[part.at] = state
    return store[part.rows, :, : part.mask.shape[-1]]


def _multiple(number: int, length: int) -> int:
    """Of `number`, the smallest that is not below `length`."""
    return -(-length // number) * number


def _memory(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    # Zeros, not empty: a masked position is multiplied by a weight of 0, and 0 * NaN is NaN.
    return like.new_zeros(rows, like.shape[1], capacity, like.shape[-1])


def _laid_out(memory: torch.Tensor, positions: int) -> torch.Tensor:
    """As [rows, heads, positions, head_dim], without a gap."""
    rows, heads, _, width = memory.shape
    return memory.view(-1)[: rows * heads * positions * width].view(rows, heads, positions, width)


def _filled(store: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """With what `old` has of its rows and positions, and zeros behind these."""
    rows, _, kept, _ = old.shape
    kept = min(kept, store.shape[2])
    store[:rows, :, :kept] = old[:, :, :kept]
    store[:, :, kept:] = 0
    return store
