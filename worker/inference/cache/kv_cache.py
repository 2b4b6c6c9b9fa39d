"""The KV cache of one batch: keys and values of its sequences, preallocated, one row a sequence.

The cache is passive: `engine/model_runner.py` decides what is computed, attention writes here and reads from here.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from worker.inference.cache.cuda_graphs import CudaGraphCache
from worker.inference.cache.forward_batch import BatchSegment

POSITIONS_BLOCK, CAPACITY_BLOCK = 32, 256
"""A row's positions in use, and its capacity, are multiples of these."""

MAX_SPARE_POSITIONS = 128
"""A CPU cache shrinks its rows only if that frees more positions than this: shrinking copies every row."""

CPU = torch.device("cpu")

Snapshot = list[tuple[torch.Tensor, torch.Tensor]]
"""One sequence's keys and values, layer by layer, each [num_kv_heads, length, head_dim]."""


class _CacheView:
    """The segment that transformers' next forward computes; all layers share it."""

    segment: BatchSegment


class LayerKVCache(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its subclass hook is untyped
    """One layer's keys and values.

    - `tensors`: keys and values, each [num_rows, num_kv_heads, num_positions, head_dim].
    - `memory`: what backs them, with `capacity` positions a row.
    """

    is_sliding = False

    def __init__(self, view: _CacheView) -> None:
        self._view = view
        self.num_rows = self.capacity = self.num_positions = 0
        self.memory: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' call: store new positions, [num_rows, num_kv_heads, new tokens a row, head_dim], and return
        all visible ones of the view's rows."""
        segment = self._view.segment
        if segment.is_decode:
            key_states, value_states = key_states[:, :, 0], value_states[:, :, 0]
        return self.write(segment, key_states, value_states)

    def write(
        self, segment: BatchSegment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a segment's new keys and values; return all visible ones of its rows.

        Both are [num_rows, num_kv_heads, new tokens a row, head_dim]; a decode segment has no third axis.
        """
        self.lazy_initialization(keys, values)
        return _write(self.tensors[0], segment, keys), _write(self.tensors[1], segment, values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on first use, when head counts and dtype are known."""
        if not self.tensors:
            self.memory = [_allocate(state, self.num_rows, self.capacity) for state in (key_states, value_states)]
            self.tensors = [_view(memory, self.num_positions) for memory in self.memory]

    def resize(self, num_rows: int, capacity: int, num_positions: int) -> None:
        """Grow and keep the contents. Memory that is larger already stays: another layer's growth may have failed."""
        self.num_rows, self.capacity = num_rows, capacity
        for index, (memory, old) in enumerate(zip(self.memory, self.tensors, strict=True)):
            rows, positions = max(num_rows, memory.shape[0]), max(capacity, memory.shape[2])
            self.memory[index] = _allocate(old, rows, positions)
            self.tensors[index] = _copy_into(_view(self.memory[index], num_positions), old)
        self.num_positions = num_positions

    def set_num_positions(self, num_positions: int) -> None:
        """Lay each row out with this many positions, and keep their contents."""
        for index, (memory, old) in enumerate(zip(self.memory, self.tensors, strict=True)):
            self.tensors[index] = _copy_into(_view(memory, num_positions), old[:, :, :num_positions].clone())
        self.num_positions = num_positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Required by transformers; unused, because every forward here brings its own mask."""
        return self._view.segment.mask.shape[-1], 0

    def get_seq_length(self) -> int:
        """Required by transformers; unused, because every forward here brings its own positions."""
        return 0

    def get_max_length(self) -> int:
        """Required by transformers: there is no limit."""
        return -1


class KVCache:
    """Keys and values of one batch.

    - Rows 0 to n-1 are in use, without gaps; a row holds one sequence, from position 0 on.
    - The caller remembers how many positions each row holds.
    - Memory is allocated for `capacity` positions a row.
    - On a GPU a row spans its whole capacity at once, because CUDA graphs hold pointers to it. On a CPU it spans what
      the longest sequence needs, because a product over a slice would copy the slice first.
    """

    def __init__(self, num_layers: int, device: torch.device = CPU) -> None:
        self.device, self._is_cpu = device, device.type == "cpu"
        self._view = _CacheView()
        self.layers = [LayerKVCache(self._view) for _ in range(num_layers)]
        self._transformers_cache = Cache(layers=[*self.layers])
        self.num_rows = self.capacity = self._num_positions = 0
        self.graphs = CudaGraphCache()

    def size_for(self, num_rows: int, length: int) -> tuple[int, int]:
        """The (rows, capacity) after `reserve` with the same arguments."""
        rows = self.num_rows if num_rows <= self.num_rows else power_of_two(num_rows)
        return rows, max(self.capacity, _round_up(length, CAPACITY_BLOCK))

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` sequences of up to `length` positions."""
        size = self.size_for(num_rows, length)
        if size != (self.num_rows, self.capacity):
            self.graphs.clear()  # they read the old memory
            num_positions = self._num_positions if self._is_cpu else size[1]
            for layer in self.layers:
                layer.resize(*size, num_positions)
            self.num_rows, self.capacity = size  # only now: an allocation may fail

    def ensure_positions(self, length: int) -> None:
        """Let each row span at least `length` positions, within its capacity."""
        if self._is_cpu and length > self._num_positions:
            self._set_num_positions(length)

    def trim(self, length: int) -> None:
        """Shrink rows if none holds more than `length` positions. At 0 the cache is as good as new."""
        if self._is_cpu and (
            length == 0 or _round_up(length, POSITIONS_BLOCK) + MAX_SPARE_POSITIONS < self._num_positions
        ):
            self._set_num_positions(length)

    def num_visible(self, length: int) -> int:
        """The number of positions that attention reads for rows of up to `length`."""
        return self._num_positions if self._is_cpu else _round_up(length, CAPACITY_BLOCK)

    def as_transformers_cache(self, segment: BatchSegment) -> Cache:
        """This cache for transformers' own forward over one segment."""
        self._view.segment = segment
        return self._transformers_cache

    @torch.inference_mode()
    def snapshot(self, row: int, length: int) -> Snapshot:
        """A copy of a row's first `length` positions."""
        return [
            (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for keys, values in (layer.tensors for layer in self.layers)
        ]

    @torch.inference_mode()
    def restore(self, row: int, snapshot: Snapshot, length: int) -> None:
        """Copy the first `length` positions of a snapshot into a row."""
        self.ensure_positions(length)
        for layer, (keys, values) in zip(self.layers, snapshot, strict=True):
            layer.lazy_initialization(keys[None], values[None])
            layer.tensors[0][row, :, :length] = keys[:, :length]
            layer.tensors[1][row, :, :length] = values[:, :length]

    @torch.inference_mode()
    def zero_row(self, row: int, length: int) -> None:
        """Zero a row's first `length` positions. A NaN there would pass through the mask of the row's next sequence,
        because 0 · NaN is NaN."""
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor[row, :, :length].zero_()

    @torch.inference_mode()
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def _set_num_positions(self, length: int) -> None:
        self._num_positions = _round_up(length, POSITIONS_BLOCK)
        for layer in self.layers:
            layer.set_num_positions(self._num_positions)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _write(tensor: torch.Tensor, segment: BatchSegment, new: torch.Tensor) -> torch.Tensor:
    tensor[segment.cache_index] = new
    return tensor[segment.rows, :, : segment.mask.shape[-1]]


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _allocate(like: torch.Tensor, num_rows: int, capacity: int) -> torch.Tensor:
    # Zeros, not empty: a masked position is multiplied by a weight of 0, and 0 · NaN is NaN.
    return like.new_zeros(num_rows, like.shape[1], capacity, like.shape[-1])


def _view(memory: torch.Tensor, num_positions: int) -> torch.Tensor:
    """The start of `memory` as a contiguous [num_rows, num_kv_heads, num_positions, head_dim]."""
    rows, heads, _, width = memory.shape
    return memory.view(-1)[: rows * heads * num_positions * width].view(rows, heads, num_positions, width)


def _copy_into(tensor: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Fill `tensor` with the rows and positions of `old` that it has, and with zeros behind those positions."""
    rows, _, positions, _ = old.shape
    positions = min(positions, tensor.shape[2])
    tensor[:rows, :, :positions] = old[:, :, :positions]
    tensor[:, :, positions:] = 0
    return tensor
