"""Places for adapters, side by side in memory: a batch of any mix of them costs two small products a joined one.

Knows no files, no bases and no requests.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from worker.inference.kv import power_of_two
from worker.inference.loras import FANS, LayerLora, Lora, Mix, PackedLayer, PackedLora
from worker.inference.products import packs

PATIENCE = 16
"""Steps for which a batch must need less before its adapters move to fewer or narrower places."""

WORTH_PACKING = 4
"""Steps that the same places are read in before they are laid out for the kernel: that costs about one step."""


class Stack:
    """A batch reads the first few places. Who comes back finds its weights where they were."""

    def __init__(
        self, layers: int, widths: Sequence[tuple[int, int]], like: torch.Tensor, *, steady: bool = False
    ) -> None:
        """`widths`: what each joined product reads and gives. `like`: whose dtype and device the weights have.
        `steady`: whether places stay as long as they suffice, and an adapter is read from its place also when it is
        the only one, so that recorded steps find everything where it was."""
        self._count, self._widths, self._like, self._steady = layers, widths, like, steady
        self._generation = object()
        self._places: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._room = 0
        self._ranks = [0] * len(FANS)
        self._layers: list[LayerLora] = []
        self._packed: dict[int, list[PackedLayer]] = {}
        self._reads = self._roomy = 0

    @property
    def bytes(self) -> int:
        """What the places take in memory, and the first few of them once more for each number that is laid out."""
        width = sum(rank * sum(widths) for rank, widths in zip(self._ranks, self._widths, strict=True))
        places = self._room + sum(self._packed)
        return places * width * self._count * self._like.element_size()

    def mix(self, rows: Sequence[str | None], adapters: dict[str, list[LayerLora]]) -> Mix | None:
        """What a batch reads whose rows have these of the `adapters`; None where no row has one."""
        wanted = list(dict.fromkeys(row for row in rows if row is not None))
        if not wanted:
            return None
        if len(wanted) == 1 and None not in rows and not self._steady:
            return Mix(adapters[wanted[0]])
        self._settle(wanted, [adapters[name] for name in wanted])
        for name in wanted:
            if name not in self._places:
                self._place(name, wanted, adapters[name])
            self._places.move_to_end(name)
        used = power_of_two(max(self._places[name] for name in wanted) + 1)
        own = torch.tensor([-1 if row is None else self._places[row] for row in rows], device=self._like.device)
        foreign = own[:, None] != torch.arange(used, device=self._like.device)
        return Mix(self._first(used), foreign[..., None], (self._generation, used))

    def clear(self) -> None:
        """Give all places back, between two steps: whoever is wanted next is moved in anew."""
        self._rebuild(0, [0] * len(FANS))

    def forget(self, name: str) -> None:
        """An adapter is gone, and its place free."""
        self._places.pop(name, None)

    def _settle(self, wanted: Sequence[str], adapters: Sequence[list[LayerLora]]) -> None:
        """Have enough places, wide enough; and no more than that, once less would have done for a while."""
        places = power_of_two(len(wanted))
        ranks = [max(_rank(layer[fan]) for adapter in adapters for layer in adapter) for fan in range(len(FANS))]
        too_few = places > self._room or any(need > had for need, had in zip(ranks, self._ranks, strict=True))
        there = [self._places[name] for name in wanted if name in self._places]
        roomy = power_of_two(max(there, default=0) + 1) > places or ranks != self._ranks
        self._roomy = self._roomy + 1 if roomy and not too_few else 0
        if too_few:
            wider = [max(sizes) for sizes in zip(ranks, self._ranks, strict=True)]
            self._rebuild(max(places, self._room), wider)
        elif self._roomy > PATIENCE and not self._steady:
            self._rebuild(places, ranks)

    def _rebuild(self, room: int, ranks: list[int]) -> None:
        """Empty places: who is wanted is moved in anew."""
        self._places.clear()
        self._layers.clear()  # before the new ones: both need not fit
        self._packed.clear()
        self._room, self._ranks, self._roomy = 0, [0] * len(FANS), 0  # as it stays where there is no memory
        self._generation = object()
        heights = [room * rank for rank in ranks]
        self._layers += [LayerLora(*map(self._empty, heights, self._widths)) for _ in range(self._count)]
        self._room, self._ranks = room, ranks

    def _empty(self, height: int, widths: tuple[int, int]) -> Lora | None:
        a, b = (self._like.new_zeros(height, width) for width in widths)
        return Lora(a, b) if height else None

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

    def _first(self, places: int) -> Sequence[LayerLora | PackedLayer]:
        self._reads += 1
        if places not in self._packed:
            ends = [places * rank for rank in self._ranks]
            plain = [LayerLora(*map(_cut, layer, ends)) for layer in self._layers]
            if self._reads <= WORTH_PACKING or not packs(self._like):
                return plain
            self._packed[places] = [PackedLayer(*(lora and PackedLora(lora) for lora in layer)) for layer in plain]
        return self._packed[places]


def _cut(lora: Lora | None, end: int) -> Lora | None:
    return None if lora is None else Lora(lora.a[:end], lora.b[:end])


def _fill(target: Lora, source: Lora | None, start: int, rank: int) -> None:
    """`source` into the `rank` rows from `start` on, and zeros behind it."""
    own = _rank(source)
    for whole, part in zip(target, source or (), strict=False):
        whole[start : start + own] = part
    for whole in target:
        whole[start + own : start + rank] = 0


def _rank(lora: Lora | None) -> int:
    return 0 if lora is None else lora.a.shape[0]
