"""Adapter slots: a buffer of LoRA weights, one adapter a slot, so that one product serves a batch of mixed adapters.

This is S-LoRA's batching with a mask in place of a gather: two small products for each fused layer.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch

from worker.inference.cache.kv_cache import power_of_two
from worker.inference.model.batch_invariance import product_shapes
from worker.inference.model.linear import can_pack
from worker.inference.model.lora import INPUT_GROUPS, LayerLora, LoraBatch, LoraPair, PackedLayerLora, PackedLoraPair

SHRINK_AFTER_STEPS, SHRINK_AFTER_CAPTURED_STEPS = 16, 512
"""The buffer shrinks once less has sufficed for this many steps: more where CUDA graphs would be captured anew."""

MAX_KEPT_FACTOR = 4
"""A growing buffer keeps its slots and ranks unless that takes more than this many times what the batch needs."""

PACK_AFTER_STEPS = 4
"""Slots are packed once they have been read unchanged for this many steps: packing takes about one step."""

LoraWeightsByAdapter = Mapping[str, list[LayerLora]]
"""The loaded adapters' weights, layer by layer, in the host's memory."""

Rows = Sequence[str | None]
"""Each row's adapter; None for the base."""


class AdapterSlots:
    """The slots of one base. A batch reads the first few; an adapter that comes back finds its weights in its slot."""

    def __init__(
        self, num_layers: int, widths: Sequence[tuple[int, int]], like: torch.Tensor, *, steady: bool = False
    ) -> None:
        """`widths`: the (in, Σ out) of each fused layer. `like`: a tensor with the slots' dtype and device.

        `steady`: slots change rarely, and even a lone adapter is read from its slot, so that CUDA graphs stay valid.
        """
        self._num_layers, self._widths, self._like, self._steady = num_layers, widths, like, steady
        self._min_columns = product_shapes(like).min_columns
        self._ranks_of: dict[str, list[int]] = {}
        self._generation = object()  # a new one for each buffer
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._num_slots = 0
        self._ranks = [0] * len(INPUT_GROUPS)
        self._layers: list[LayerLora] = []
        self._packed: dict[int, list[PackedLayerLora]] = {}  # by the number of slots read
        self._reads = self._oversized_steps = self._reserved = 0

    @property
    def bytes(self) -> int:
        """Bytes of the buffer and its packed copies on the device, or what is reserved if that is more."""
        return max(self._reserved, self._size(self._num_slots + sum(self._packed), self._ranks))

    def reserve(
        self, rows: Rows, adapters: LoraWeightsByAdapter, make_room: Callable[[Callable[[], int]], None]
    ) -> None:
        """Reserve what `select` will need for these rows, in place of the last reservation.

        `make_room` gets a function that returns the bytes to add; it raises if they do not fit.
        """
        make_room(lambda: max(0, self._bytes_for(rows, adapters) - self.bytes))
        self._reserved = self._bytes_for(rows, adapters)

    def select(self, rows: Rows, adapters: LoraWeightsByAdapter, *, deterministic: bool = False) -> LoraBatch | None:
        """The adapters of a batch with these rows, filled into slots; None if all rows are the base's.

        `deterministic`: the batch has one row, whose shapes must not depend on other requests.
        """
        wanted = _adapters_of(rows)
        if not wanted:
            return None
        if deterministic or self._is_lone_adapter(wanted, rows):
            return LoraBatch(adapters[wanted[0]])
        self._fit_buffer(wanted, adapters)
        for name in wanted:
            if name not in self._slots:
                self._fill_slot(name, wanted, adapters[name])
            self._slots.move_to_end(name)
        last_slot = max(self._slots[name] for name in wanted)
        num_read = max(power_of_two(last_slot + 1), self._min_slots_read())
        own_slot = torch.tensor([-1 if row is None else self._slots[row] for row in rows], device=self._like.device)
        mask = own_slot[:, None] != torch.arange(num_read, device=self._like.device)  # [num_rows, num_slots]
        return LoraBatch(self._first(num_read), mask[..., None], (self._generation, num_read))

    def free(self) -> None:
        """Free the buffer, between two steps. Adapters are filled in anew when a batch needs them."""
        self._reallocate(0, [0] * len(INPUT_GROUPS))
        self._reserved = 0

    def remove(self, name: str) -> None:
        """Free the slot of an adapter that is no longer loaded."""
        self._slots.pop(name, None)
        self._ranks_of.pop(name, None)

    @property
    def _reads_own_weights(self) -> bool:
        """Whether a batch of a single adapter reads its own weights: only if they are on the same device."""
        return not self._steady and self._like.device.type == "cpu"

    @property
    def _copies(self) -> int:
        """How often slots may be in memory: plain, and packed for all of them, for half of them, for a quarter, …"""
        return 3 if can_pack(self._like) else 1

    def _is_lone_adapter(self, wanted: Sequence[str], rows: Rows) -> bool:
        return len(wanted) == 1 and None not in rows and self._reads_own_weights

    def _needed(self, wanted: Sequence[str], adapters: LoraWeightsByAdapter) -> tuple[int, list[int]]:
        """The number of slots, and the rank of each fused layer."""
        for name in wanted:
            if name not in self._ranks_of:
                layers, groups = adapters[name], range(len(INPUT_GROUPS))
                self._ranks_of[name] = [max(_rank(layer[group]) for layer in layers) for group in groups]
        ranks = [max(ranks) for ranks in zip(*(self._ranks_of[name] for name in wanted), strict=True)]
        return power_of_two(len(wanted)), ranks

    def _widened(self, num_slots: int, ranks: Sequence[int]) -> list[int]:
        """Ranks that give the products of so many slots the columns that they need."""
        return [rank and max(rank, self._min_columns // num_slots) for rank in ranks]

    def _min_slots_read(self) -> int:
        """The number of slots, a power of two, that gives each product the columns that it needs."""
        return power_of_two(max(-(-self._min_columns // rank) for rank in self._ranks if rank))

    def _is_too_small(self, num_slots: int, ranks: Sequence[int]) -> bool:
        return num_slots > self._num_slots or any(need > had for need, had in zip(ranks, self._ranks, strict=True))

    def _grown(self, num_slots: int, ranks: list[int]) -> tuple[int, list[int]]:
        """The larger of the needed and the present sizes, unless that is too much for what is needed."""
        kept_slots = max(num_slots, self._num_slots)
        kept_ranks = [max(both) for both in zip(ranks, self._ranks, strict=True)]
        is_too_much = self._size(kept_slots, kept_ranks) > MAX_KEPT_FACTOR * self._size(num_slots, ranks)
        slots, ranks = (num_slots, ranks) if is_too_much else (kept_slots, kept_ranks)
        return slots, self._widened(slots, ranks)

    def _bytes_for(self, rows: Rows, adapters: LoraWeightsByAdapter) -> int:
        """Bytes of the buffer that `select` will read, and of its packed copies."""
        wanted = _adapters_of(rows)
        if not wanted or self._is_lone_adapter(wanted, rows):
            return 0
        needed = self._needed(wanted, adapters)
        num_slots, ranks = self._grown(*needed) if self._is_too_small(*needed) else (self._num_slots, self._ranks)
        return self._size(num_slots, ranks) * self._copies

    def _size(self, num_slots: int, ranks: Sequence[int]) -> int:
        """Bytes."""
        width = sum(rank * sum(widths) for rank, widths in zip(ranks, self._widths, strict=True))
        return num_slots * width * self._num_layers * self._like.element_size()

    def _fit_buffer(self, wanted: Sequence[str], adapters: LoraWeightsByAdapter) -> None:
        """Grow the buffer at once if it is too small; shrink it after it has been too large for a while."""
        num_slots, ranks = self._needed(wanted, adapters)
        if self._is_too_small(num_slots, ranks):
            self._reallocate(*self._grown(num_slots, ranks))
            return
        used = [self._slots[name] for name in wanted if name in self._slots]
        is_oversized = (
            power_of_two(max(used, default=0) + 1) > num_slots or self._widened(self._num_slots, ranks) != self._ranks
        )
        self._oversized_steps = self._oversized_steps + 1 if is_oversized else 0
        if self._oversized_steps > (SHRINK_AFTER_CAPTURED_STEPS if self._steady else SHRINK_AFTER_STEPS):
            self._reallocate(num_slots, self._widened(num_slots, ranks))

    def _reallocate(self, num_slots: int, ranks: list[int]) -> None:
        """A new buffer with empty slots."""
        self._slots.clear()
        self._layers.clear()  # before the new ones are allocated: both need not fit
        self._packed.clear()
        self._num_slots, self._ranks, self._oversized_steps = 0, [0] * len(INPUT_GROUPS), 0  # if allocation fails
        self._generation = object()
        heights = [num_slots * rank for rank in ranks]
        self._layers += [LayerLora(*map(self._empty, heights, self._widths)) for _ in range(self._num_layers)]
        self._num_slots, self._ranks = num_slots, ranks

    def _empty(self, height: int, widths: tuple[int, int]) -> LoraPair | None:
        lora_A, lora_B = (self._like.new_zeros(height, width) for width in widths)
        return LoraPair(lora_A, lora_B, height) if height else None

    def _fill_slot(self, name: str, wanted: Sequence[str], adapter: list[LayerLora]) -> None:
        """Copy an adapter into a free slot, or evict the adapter whose slot was used least recently."""
        num_read = power_of_two(max(len(wanted), *(self._slots.get(other, 0) + 1 for other in wanted)))
        taken = set(self._slots.values())
        slot = next((free for free in range(num_read) if free not in taken), None)
        if slot is None:
            evicted = next(other for other, at in self._slots.items() if other not in wanted and at < num_read)
            slot = self._slots.pop(evicted)
        self._slots[name] = slot
        self._packed.clear()
        self._reads = 0
        for buffer, own in zip(self._layers, adapter, strict=True):
            for rank, target, source in zip(self._ranks, buffer, own, strict=True):
                if target is not None:
                    _copy_into_slot(target, source, slot * rank, rank)

    def _first(self, num_slots: int) -> Sequence[LayerLora | PackedLayerLora]:
        """The weights of the first slots, packed once they are stable."""
        self._reads += 1
        if num_slots not in self._packed:
            ends = [num_slots * rank for rank in self._ranks]
            plain = [LayerLora(*map(_cut, layer, ends)) for layer in self._layers]
            if self._reads <= PACK_AFTER_STEPS or not can_pack(self._like):
                return plain
            self._packed[num_slots] = [
                PackedLayerLora(*(lora and PackedLoraPair(lora) for lora in layer)) for layer in plain
            ]
        return self._packed[num_slots]


def _adapters_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row for row in rows if row is not None))


def _cut(lora: LoraPair | None, end: int) -> LoraPair | None:
    return None if lora is None else LoraPair(lora.lora_A[:end], lora.lora_B[:end], end)


def _copy_into_slot(target: LoraPair, source: LoraPair | None, start: int, rank: int) -> None:
    """Copy `source` into the `rank` rows from `start` on, and zero the rows behind it."""
    own_rank = _rank(source)
    if source is not None:
        target.lora_A[start : start + own_rank] = source.lora_A[:own_rank]
        target.lora_B[start : start + own_rank] = source.lora_B[:own_rank]
    for buffer in (target.lora_A, target.lora_B):
        buffer[start + own_rank : start + rank] = 0


def _rank(lora: LoraPair | None) -> int:
    return 0 if lora is None else lora.rank
