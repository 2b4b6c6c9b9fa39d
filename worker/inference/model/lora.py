"""LoRA weights for our own Llama-family forward, fused like its linear layers: read from a PEFT adapter's tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch.nn import functional

from worker.inference.errors import LoraError
from worker.inference.model.batch_invariance import add_by_row_blocks, by_row_blocks, product_shapes
from worker.inference.model.linear import PackedLinear

INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers that share one input and are fused into one product, in the order of `LayerLora`'s fields."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.*\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])\.weight"
)


class LoraPair(NamedTuple):
    """One fused layer's LoRA.

    - `lora_A`: [Σ rank, in].
    - `lora_B`: [Σ rank, Σ out], scaled by alpha/rank; zero where a rank belongs to another output.
    - `rank`: how many of these ranks are the adapter's. The others are zeros, for the kernel's sake.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.lora_A.nbytes + self.lora_B.nbytes

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """x·Aᵀ, [num_tokens, in] → [num_tokens, Σ rank]. Copies the weights to the device of `x` if need be."""
        weight = self.lora_A.to(x.device)
        return by_row_blocks(lambda block: functional.linear(block, weight), x, product_shapes(x))

    def add_up(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`out` [num_tokens, Σ out] + x·B, in place; `x` is [num_tokens, Σ rank]."""
        weight = self.lora_B.to(x.device)
        return add_by_row_blocks(lambda to, block: to.addmm_(block, weight), out, x, product_shapes(x))


class PackedLoraPair:
    """A `LoraPair` in the kernel's packed layout. Its results have the same bits."""

    def __init__(self, lora: LoraPair) -> None:
        self._lora_A, self._lora_B = PackedLinear(lora.lora_A), PackedLinear(lora.lora_B.t())

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """As `LoraPair.down`."""
        return self._lora_A(x)

    def add_up(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As `LoraPair.add_up`."""
        return self._lora_B.add_to(out, x)


class LayerLora(NamedTuple):
    """One decoder layer's LoRA, by fused layer; None where the adapter has no weights."""

    qkv: LoraPair | None = None
    o: LoraPair | None = None
    gate_up: LoraPair | None = None
    down: LoraPair | None = None


class PackedLayerLora(NamedTuple):
    """A `LayerLora` in packed layout."""

    qkv: PackedLoraPair | None
    o: PackedLoraPair | None
    gate_up: PackedLoraPair | None
    down: PackedLoraPair | None


class LoraBatch(NamedTuple):
    """The adapters that one step applies (S-LoRA's batching: one product over all slots, each row masked to its own).

    - `layers`: their weights, layer by layer.
    - `other_adapter_mask`: [num_rows, num_slots, 1], False only at a row's own slot; None if all rows have the one
      adapter whose weights these are.
    - `slots`: identifies the slot buffer that is read, whichever adapters it holds; None if `layers` are an adapter's
      own weights.
    """

    layers: Sequence[LayerLora | PackedLayerLora]
    other_adapter_mask: torch.Tensor | None = None
    slots: tuple[object, int] | None = None


Linears = Mapping[str, torch.nn.Linear]
"""A model's linear layers, by module name."""


def read_lora(
    config: LoraConfig, weights: dict[str, torch.Tensor], linears: Linears, dtype: torch.dtype
) -> list[LayerLora] | None:
    """A PEFT adapter's weights, fused, in the host's memory; None if it has parts that only PEFT can apply. Raises
    LoraError."""
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
    pairs = {name: _scaled(config, name, here[name], linears[name]) for name in wanted}
    layers = sum(name.endswith(f".{INPUT_GROUPS[1][0]}") for name in linears)
    return [LayerLora(*(_fuse(number, group, pairs, linears) for group in INPUT_GROUPS)) for number in range(layers)]


def _scaled(config: LoraConfig, name: str, sides: dict[str, torch.Tensor], linear: torch.nn.Linear) -> LoraPair:
    """One linear layer's weights, B transposed and scaled (rsLoRA scales by alpha/√rank)."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    a, b = sides["A"], sides["B"]
    if a.shape != (rank, linear.in_features) or b.shape != (linear.out_features, rank):
        raise LoraError(f"{name} has weights of another shape")
    b = b.t() * (alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise LoraError(f"{name} has weights beyond {a.dtype}'s range")
    return LoraPair(a, b, rank)


def _fuse(number: int, group: tuple[str, ...], pairs: dict[str, LoraPair], linears: Linears) -> LoraPair | None:
    """The pairs of one layer's linear layers that share an input, as one: A stacked, B block-diagonal."""
    parent = "mlp" if group in INPUT_GROUPS[2:] else "self_attn"
    names = [f"model.layers.{number}.{parent}.{leaf}" for leaf in group]
    adapted = [pairs[name] for name in names if name in pairs]
    if not adapted:
        return None
    lora_A = torch.cat([pair.lora_A for pair in adapted])
    shapes = product_shapes(linears[names[0]].weight)
    padded_rank = shapes.padded_rank(len(lora_A))
    lora_A = functional.pad(lora_A, (0, 0, 0, max(padded_rank, shapes.min_columns) - len(lora_A)))
    lora_B = lora_A.new_zeros(lora_A.shape[0], sum(linears[name].out_features for name in names))
    rank = column = 0
    for name in names:
        if (pair := pairs.get(name)) is not None:
            height, width = pair.lora_B.shape
            lora_B[rank : rank + height, column : column + width] = pair.lora_B
            rank += height
        column += linears[name].out_features
    return LoraPair(lora_A, lora_B, padded_rank)
