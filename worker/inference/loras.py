"""LoRA for the lean forward: an adapter's weights as they lie beside the joined products, read from its directory's
tensors; and several adapters stacked, so that a batch of any mix of them costs two small products a joined one.

Knows no files, no bases and no requests.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

FANS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The layers that read one input, in the order of `LayerLora`'s fields."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.*\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])\.weight"
)


class LoraError(Exception):
    """The weights are not those of an adapter over this model; the message says why."""


class Lora(NamedTuple):
    """`a`: [Σ rank, in]; `b`: [Σ rank, Σ out], scaled, zero where a rank belongs to another output."""

    a: torch.Tensor
    b: torch.Tensor


class LayerLora(NamedTuple):
    """One layer's LoRA by the input that is read; None where an adapter leaves those products alone."""

    qkv: Lora | None = None
    o: Lora | None = None
    gate_up: Lora | None = None
    down: Lora | None = None


class Mix(NamedTuple):
    """Stacked adapters, layer by layer. `chosen`: [rows, places, 1], one where a row's own adapter lies and zero
    elsewhere; None where all rows have the only one."""

    layers: list[LayerLora]
    chosen: torch.Tensor | None = None


Linears = Mapping[str, torch.nn.Linear]
"""A model's linear layers by name."""


def read_lora(config: LoraConfig, weights: dict[str, torch.Tensor], linears: Linears) -> list[LayerLora] | None:
    """An adapter beside the products of a Llama-like model, in its dtype and on its device; None where it has parts
    elsewhere. Raises LoraError."""
    if config.use_dora or config.bias != "none" or config.modules_to_save or config.lora_bias:
        return None
    given: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        if (match := _KEY.fullmatch(key)) is None:
            return None
        given.setdefault(match["module"], {})[match["side"]] = tensor
    wanted = {name for name in linears if check_target_module_exists(config, name)}
    if any(".layers." not in name for name in wanted):
        return None
    complete = {name for name, sides in given.items() if len(sides) == 2}
    if missing := len(wanted - complete):
        raise LoraError(f"{missing} of its weights are missing")
    if surplus := len(given.keys() - wanted):
        raise LoraError(f"{surplus} of its weights are not in the base")
    if not wanted:
        raise LoraError("its target_modules name nothing there")
    parts = {name: _scaled(config, name, given[name], linears[name]) for name in wanted}
    layers = sum(name.endswith(f".{FANS[1][0]}") for name in linears)
    return [LayerLora(*(_joined(number, fan, parts, linears) for fan in FANS)) for number in range(layers)]


def _scaled(config: LoraConfig, name: str, sides: dict[str, torch.Tensor], linear: torch.nn.Linear) -> Lora:
    """One linear layer's, with B transposed and scaled."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    a, b = (sides[side].to(linear.weight.device, linear.weight.dtype) for side in "AB")
    if a.shape != (rank, linear.in_features) or b.shape != (linear.out_features, rank):
        raise LoraError(f"{name} has weights of another shape")
    return Lora(a, b.t() * (alpha / (math.sqrt(rank) if config.use_rslora else rank)))


def _joined(number: int, fan: tuple[str, ...], parts: dict[str, Lora], linears: Linears) -> Lora | None:
    home = "mlp" if fan in FANS[2:] else "self_attn"
    names = [f"model.layers.{number}.{home}.{leaf}" for leaf in fan]
    adapted = [parts[name] for name in names if name in parts]
    if not adapted:
        return None
    downs = torch.cat([part.a for part in adapted])
    ups = downs.new_zeros(downs.shape[0], sum(linears[name].out_features for name in names))
    rank = column = 0
    for name in names:
        if (part := parts.get(name)) is not None:
            ups[rank : rank + part.b.shape[0], column : column + part.b.shape[1]] = part.b
            rank += part.b.shape[0]
        column += linears[name].out_features
    return Lora(downs, ups)


class Stack:
    """Places for adapters, side by side in memory. A batch reads the first few: those that it needs are moved there."""

    def __init__(self, layers: int, widths: Sequence[tuple[int, int]], like: torch.Tensor) -> None:
        """`widths`: what each joined product reads and gives. `like`: whose dtype and device the weights have."""
        self._count, self._widths, self._like = layers, widths, like
        self._places: dict[str, int] = {}
        self._room = 0
        self._ranks = [0] * len(FANS)
        self._layers: list[LayerLora] = []

    def mix(self, rows: Sequence[str | None], adapters: dict[str, list[LayerLora]]) -> Mix | None:
        """What a batch reads whose rows have these of the `adapters`; None where no row has one."""
        wanted = list(dict.fromkeys(row for row in rows if row is not None))
        if not wanted:
            return None
        if len(wanted) == 1 and None not in rows:
            return Mix(adapters[wanted[0]])
        used = 1 << (len(wanted) - 1).bit_length()
        self._make_room(used, [adapters[name] for name in wanted])
        for name in wanted:
            if self._places.get(name, used) >= used:
                self._place(name, used, wanted, adapters[name])
        chosen = self._like.new_zeros(len(rows), used, 1)
        for place, row in enumerate(rows):
            if row is not None:
                chosen[place, self._places[row]] = 1
        return Mix([self._first(layer, used) for layer in self._layers], chosen)

    def forget(self, name: str) -> None:
        """An adapter is gone, and its place free."""
        self._places.pop(name, None)

    def _make_room(self, places: int, adapters: Sequence[list[LayerLora]]) -> None:
        """At least so many places, each at least as wide as these adapters. Who lay in others is moved in anew."""
        needed = [max(_rank(layer[fan]) for adapter in adapters for layer in adapter) for fan in range(len(FANS))]
        ranks = [max(had, need) for had, need in zip(self._ranks, needed, strict=True)]
        if places <= self._room and ranks == self._ranks:
            return
        self._places.clear()
        self._layers.clear()  # before the new ones: both need not fit
        self._room, self._ranks = max(places, self._room), ranks
        self._layers += [LayerLora(*map(self._empty, ranks, self._widths)) for _ in range(self._count)]

    def _empty(self, rank: int, widths: tuple[int, int]) -> Lora | None:
        a, b = (self._like.new_zeros(self._room * rank, width) for width in widths)
        return Lora(a, b) if rank else None

    def _place(self, name: str, used: int, wanted: Sequence[str], adapter: list[LayerLora]) -> None:
        """Move an adapter into one of the first `used` places that no other wanted one has."""
        taken = {self._places[other] for other in wanted if other in self._places}
        place = next(free for free in range(used) if free not in taken)
        self._places = {other: there for other, there in self._places.items() if there != place}
        self._places[name] = place
        for stacked, own in zip(self._layers, adapter, strict=True):
            for rank, target, source in zip(self._ranks, stacked, own, strict=True):
                if target is not None:
                    _fill(target, source, place * rank, rank)

    def _first(self, layer: LayerLora, places: int) -> LayerLora:
        ends = [places * rank for rank in self._ranks]
        return LayerLora(*(lora and Lora(lora.a[:end], lora.b[:end]) for lora, end in zip(layer, ends, strict=True)))


def _fill(target: Lora, source: Lora | None, start: int, rank: int) -> None:
    """`source` into the `rank` rows from `start` on, and zeros behind it."""
    own = _rank(source)
    for whole, part in zip(target, source or (), strict=False):
        whole[start : start + own] = part
    for whole in target:
        whole[start + own : start + rank] = 0


def _rank(lora: Lora | None) -> int:
    return 0 if lora is None else lora.a.shape[0]
