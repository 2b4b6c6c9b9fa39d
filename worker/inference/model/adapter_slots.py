"""Places for adapters, side by side in memory: a batch of any mix of them costs two small products a joined one.

Knows no files, no bases and no requests.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from worker.inference.cache.kv_cache import power_of_two
from worker.inference.model.linear import packs
from worker.inference.model.lora import INPUT_GROUPS, LayerLora, LoraBatch, LoraPair, PackedLayerLora, PackedLoraPair

PATIENCE, STEADY_PATIENCE = 16, 512
"""Steps for which a batch must need less before its adapters move to fewer or narrower places; and where steps have to
be recorded anew for that."""

GENEROUS = 4
"""Times what a batch needs that places may take, so that those who had one still have it."""

WORTH_PACKING = 4
"""Steps that the same places are read in before they are laid out for the kernel: that costs about one step."""

LoraWeightsByAdapter = Mapping[str, list[LayerLora]]
"""Adapters by name, layer by layer, in the host's memory."""


class AdapterSlots:
    """A batch reads the first few places. Who comes back finds its weights where they were."""

    def __init__(
        self, layers: int, widths: Sequence[tuple[int, int]], like: torch.Tensor, *, steady: bool = False
    ) -> None:
        """`widths`: what each joined product reads and gives. `like`: whose dtype and device the places have.
        `steady`: whether places stay for long, and an adapter is read from its place also when it is the only one, so
        that recorded steps find everything where it was."""
        self._count, self._widths, self._like, self._steady = layers, widths, like, steady
        self._needs: dict[str, list[int]] = {}  # ranks
        self._generation = object()
        self._places: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._room = 0
        self._ranks = [0] * len(INPUT_GROUPS)
        self._layers: list[LayerLora] = []
        self._packed: dict[int, list[PackedLayerLora]] = {}
        self._reads = self._roomy = self._promised = 0

    @property
    def bytes(self) -> int:
        """What the places take on the device, the first few of them once more for each number that is laid out; or what
        was promised, where that is more."""
        return max(self._promised, self._size(self._room + sum(self._packed), self._ranks))

    def growth(self, rows: Sequence[str | None], adapters: LoraWeightsByAdapter) -> int:
        """Bytes that `mix` will add for these, at most."""
        return max(0, self._foreseen(rows, adapters) - self.bytes)

    def growth_with(self, size: int, rows: Sequence[str | None], adapters: LoraWeightsByAdapter) -> int:
        """The same with one more, of which only the bytes are known; or more than that: it may be wide where the others
        are narrow, and places that are there may stay."""
        wanted = _named(rows)
        if not rows and self._reads_own:
            return 0
        _, ranks = self._need(wanted, adapters) if wanted else (0, [0] * len(INPUT_GROUPS))
        wider = [max(both) for both in zip(ranks, self._ranks, strict=True)]
        places = power_of_two(len(wanted) + 1)
        least = places * (self._size(1, ranks) + size)
        kept = max(places, self._room) * (self._size(1, wider) + size)
        most = max(min(kept, GENEROUS * least), self._size(self._room, self._ranks))
        return max(0, most * self._copies - self.bytes)

    def promise(self, rows: Sequence[str | None], adapters: LoraWeightsByAdapter) -> None:
        """Count from now on what `mix` will take for these, instead of those before."""
        self._promised = self._foreseen(rows, adapters)

    def mix(
        self, rows: Sequence[str | None], adapters: LoraWeightsByAdapter, *, alone: bool = False
    ) -> LoraBatch | None:
        """What a batch reads whose rows have these of the `adapters`; None where no row has one. `alone`: the only row
        is to be computed in shapes that depend on nobody else."""
        wanted = _named(rows)
        if not wanted:
            return None
        if alone or self._is_lone(wanted, rows):
            return LoraBatch(adapters[wanted[0]])
        self._settle(wanted, adapters)
        for name in wanted:
            if name not in self._places:
                self._place(name, wanted, adapters[name])
            self._places.move_to_end(name)
        used = power_of_two(max(self._places[name] for name in wanted) + 1)
        own = torch.tensor([-1 if row is None else self._places[row] for row in rows], device=self._like.device)
        foreign = own[:, None] != torch.arange(used, device=self._like.device)
        return LoraBatch(self._first(used), foreign[..., None], (self._generation, used))

    def clear(self) -> None:
        """Give all places back, between two steps: whoever is wanted next is moved in anew."""
        self._rebuild(0, [0] * len(INPUT_GROUPS))
        self._promised = 0

    def forget(self, name: str) -> None:
        """An adapter is gone, and its place free."""
        self._places.pop(name, None)
        self._needs.pop(name, None)

    @property
    def _reads_own(self) -> bool:
        """Whether a batch of one adapter's rows reads its own memory: not where that is another device's."""
        return not self._steady and self._like.device.type == "cpu"

    @property
    def _copies(self) -> int:
        """How often places are there, with what is laid out of them: all, half of them, a quarter, …"""
        return 3 if packs(self._like) else 1

    def _is_lone(self, wanted: Sequence[str], rows: Sequence[str | None]) -> bool:
        return len(wanted) == 1 and None not in rows and self._reads_own

    def _need(self, wanted: Sequence[str], adapters: LoraWeightsByAdapter) -> tuple[int, list[int]]:
        """How many places, and how wide ones."""
        for name in wanted:
            if name not in self._needs:
                self._needs[name] = [
                    max(_rank(layer[fan]) for layer in adapters[name]) for fan in range(len(INPUT_GROUPS))
                ]
        return power_of_two(len(wanted)), [max(ranks) for ranks in zip(*(self._needs[n] for n in wanted), strict=True)]

    def _is_too_small(self, places: int, ranks: Sequence[int]) -> bool:
        return places > self._room or any(need > had for need, had in zip(ranks, self._ranks, strict=True))

    def _grown(self, places: int, ranks: list[int]) -> tuple[int, list[int]]:
        """As many as there were, and as wide, too, where that is not much more than these."""
        room, wider = max(places, self._room), [max(both) for both in zip(ranks, self._ranks, strict=True)]
        is_much = self._size(room, wider) > GENEROUS * self._size(places, ranks)
        return (places, ranks) if is_much else (room, wider)

    def _foreseen(self, rows: Sequence[str | None], adapters: LoraWeightsByAdapter) -> int:
        """Bytes of the places that `mix` will read, and of what will be laid out of them."""
        wanted = _named(rows)
        if not wanted or self._is_lone(wanted, rows):
            return 0
        need = self._need(wanted, adapters)
        places, ranks = self._grown(*need) if self._is_too_small(*need) else (self._room, self._ranks)
        return self._size(places, ranks) * self._copies

    def _size(self, places: int, ranks: Sequence[int]) -> int:
        """Bytes."""
        width = sum(rank * sum(widths) for rank, widths in zip(ranks, self._widths, strict=True))
        return places * width * self._count * self._like.element_size()

    def _settle(self, wanted: Sequence[str], adapters: LoraWeightsByAdapter) -> None:
        """Have enough places, wide enough; and no more than that, once less would have done for a while."""
        places, ranks = self._need(wanted, adapters)
        there = [self._places[name] for name in wanted if name in self._places]
        roomy = power_of_two(max(there, default=0) + 1) > places or ranks != self._ranks
        if self._is_too_small(places, ranks):
            self._rebuild(*self._grown(places, ranks))
            return
        self._roomy = self._roomy + 1 if roomy else 0
        if self._roomy > (STEADY_PATIENCE if self._steady else PATIENCE):
            self._rebuild(places, ranks)

    def _rebuild(self, room: int, ranks: list[int]) -> None:
        """Empty places: who is wanted is moved in anew."""
        self._places.clear()
        self._layers.clear()  # before the new ones: both need not fit
        self._packed.clear()
        self._room, self._ranks, self._roomy = 0, [0] * len(INPUT_GROUPS), 0  # as it stays where there is no memory
        self._generation = object()
        heights = [room * rank for rank in ranks]
        self._layers += [LayerLora(*map(self._empty, heights, self._widths)) for _ in range(self._count)]
        self._room, self._ranks = room, ranks

    def _empty(self, height: int, widths: tuple[int, int]) -> LoraPair | None:
        a, b = (self._like.new_zeros(height, width) for width in widths)
        return LoraPair(a, b) if height else None

    def _place(self, name: str, wanted: Sequence[str], adapter: list[LayerLora]) -> None:
        """Move an adapter into an empty place, or else into the one that was needed least recently."""
        among = power_of_two(max(len(wanted), *(self._places.get(other, 0) + 1 for other in wanted)))
        taken = set(self._places.values())
        place = next((free for free in range(among) if free not in taken), None)
        if place is None:
            given_up = next(n for n, there in self._places.items() if n not in wanted and there < among)
            place = self._places.pop(given_up)
        self._places[name] = place
        self._packed.clear()
        self._reads = 0
        for stacked, own in zip(self._layers, adapter, strict=True):
            for rank, target, source in zip(self._ranks, stacked, own, strict=True):
                if target is not None:
                    _fill(target, source, place * rank, rank)

    def _first(self, places: int) -> Sequence[LayerLora | PackedLayerLora]:
        self._reads += 1
        if places not in self._packed:
            ends = [places * rank for rank in self._ranks]
            plain = [LayerLora(*map(_cut, layer, ends)) for layer in self._layers]
            if self._reads <= WORTH_PACKING or not packs(self._like):
                return plain
            self._packed[places] = [
                PackedLayerLora(*(lora and PackedLoraPair(lora) for lora in layer)) for layer in plain
            ]
        return self._packed[places]


def _named(rows: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(row for row in rows if row is not None))


def _cut(lora: LoraPair | None, end: int) -> LoraPair | None:
    return None if lora is None else LoraPair(lora.a[:end], lora.b[:end])


def _fill(target: LoraPair, source: LoraPair | None, start: int, rank: int) -> None:
    """`source` into the `rank` rows from `start` on, and zeros behind it."""
    own = _rank(source)
    for whole, part in zip(target, source or (), strict=False):
        whole[start : start + own] = part
    for whole in target:
        whole[start + own : start + rank] = 0


def _rank(lora: LoraPair | None) -> int:
    return 0 if lora is None else lora.a.shape[0]
