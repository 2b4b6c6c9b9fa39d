"""Linear layers of frozen weights: packed once into the layout of the CPU's kernel, or left to bitsandbytes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from worker.inference.model.batch_invariance import add_by_row_blocks, by_row_blocks, product_shapes

TYPICAL_DECODE_ROWS = 16
"""The kernel chooses its weight layout for this many rows. Any other number works with it too."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a packed layout for it: bfloat16 on a CPU that multiplies bfloat16."""
    kernels: Any = torch.ops.mkldnn
    library: Any = torch.backends.mkldnn
    fits = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
    return bool(fits and library.is_available() and kernels._is_mkldnn_bf16_supported())


class PackedLinear:
    """x·Wᵀ + b, `weight` [out, in].

    The weight is kept, and once more in the packed layout where there is one: packing it for every product nearly
    doubles the time of a 16-row step. The kernels' overloads are looked up once: each lookup takes 6 µs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        kernels: Any = torch.ops.mkldnn
        self._linear, self._linear_add = kernels._linear_pointwise.default, kernels._linear_pointwise.binary
        self._bias = bias
        self._packed = kernels._reorder_linear_weight(weight, TYPICAL_DECODE_ROWS) if can_pack(weight) else None
        self._weight = weight
        self._shapes = product_shapes(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias)
        return by_row_blocks(self._multiply, x, self._shapes)

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`out` [num_tokens, out] + x·Wᵀ, in place, without the bias."""
        if self._packed is None:
            return out.addmm_(x, self._weight.t())
        return add_by_row_blocks(self._multiply_and_add, out, x, self._shapes)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._linear(x, self._packed, self._bias, "none", [], "")
        return product

    def _multiply_and_add(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self._linear_add(x, out, self._packed, None, "add")
        return added


class SeparateLinears:
    """Quantised layers over one input, each computed by its own kernel."""

    def __init__(self, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self._layers = layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, Σ out]."""
        outs = [layer(x) for layer in self._layers]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)
