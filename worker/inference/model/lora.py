"""LoRA for the lean forward: an adapter's weights as they lie beside the joined products, read from its directory's
tensors. Knows no files, no bases and no requests.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch.nn import functional

from worker.inference.model.linear import PackedLinear

INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The layers that read one input, in the order of `LayerLora`'s fields."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.*\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])\.weight"
)


class LoraError(Exception):
    """The weights are not those of an adapter over this model; the message says why."""


class LoraPair(NamedTuple):
    """`a`: [Σ rank, in]; `b`: [Σ rank, Σ out], scaled, zero where a rank belongs to another output."""

    a: torch.Tensor
    b: torch.Tensor

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, Σ rank]. Weights that lie elsewhere are brought to the tokens."""
        return functional.linear(x, self.a.to(x.device))

    def up(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[tokens, Σ rank] brought up and added to `out` [tokens, Σ out]."""
        return out.addmm_(x, self.b.to(x.device))


class PackedLoraPair:
    """The same, laid out for many decode steps; to the bit the same results."""

    def __init__(self, lora: LoraPair) -> None:
        self._a, self._b = PackedLinear(lora.a), PackedLinear(lora.b.t())

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """As `LoraPair.down`."""
        return self._a(x)

    def up(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As `LoraPair.up`."""
        return self._b.onto(x, out)


class LayerLora(NamedTuple):
    """One layer's LoRA by the input that is read; None where an adapter leaves those products alone."""

    qkv: LoraPair | None = None
    o: LoraPair | None = None
    gate_up: LoraPair | None = None
    down: LoraPair | None = None


class PackedLayerLora(NamedTuple):
    """`LayerLora`, packed."""

    qkv: PackedLoraPair | None
    o: PackedLoraPair | None
    gate_up: PackedLoraPair | None
    down: PackedLoraPair | None


class LoraBatch(NamedTuple):
    """Adapters, layer by layer. `foreign`: [rows, places, 1], true but where a row's own adapter lies; None where all
    rows have the only one. `places`: names the memory that is read, whoever lies there; None where it is an adapter's
    own."""

    layers: Sequence[LayerLora | PackedLayerLora]
    foreign: torch.Tensor | None = None
    places: tuple[object, int] | None = None


Linears = Mapping[str, torch.nn.Linear]
"""A model's linear layers by name."""


def read_lora(
    config: LoraConfig, weights: dict[str, torch.Tensor], linears: Linears, dtype: torch.dtype
) -> list[LayerLora] | None:
    """An adapter beside the products of a Llama-like model, in the host's memory; None where it has parts elsewhere.
    Raises LoraError."""
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
    here = {name: {side: given[name][side].to(dtype) for side in "AB"} for name in wanted}
    parts = {name: _scaled(config, name, here[name], linears[name]) for name in wanted}
    layers = sum(name.endswith(f".{INPUT_GROUPS[1][0]}") for name in linears)
    return [LayerLora(*(_joined(number, fan, parts, linears) for fan in INPUT_GROUPS)) for number in range(layers)]


def _scaled(config: LoraConfig, name: str, sides: dict[str, torch.Tensor], linear: torch.nn.Linear) -> LoraPair:
    """One linear layer's, with B transposed and scaled."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    a, b = sides["A"], sides["B"]
    if a.shape != (rank, linear.in_features) or b.shape != (linear.out_features, rank):
        raise LoraError(f"{name} has weights of another shape")
    b = b.t() * (alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise LoraError(f"{name} has weights beyond {a.dtype}'s range")
    return LoraPair(a, b)


def _joined(number: int, fan: tuple[str, ...], parts: dict[str, LoraPair], linears: Linears) -> LoraPair | None:
    home = "mlp" if fan in INPUT_GROUPS[2:] else "self_attn"
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
    return LoraPair(downs, ups)
