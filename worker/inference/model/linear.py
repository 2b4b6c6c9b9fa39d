"""x → x·Wᵀ + b over weights that do not change, in the layout that the kernel reads. Knows no models."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

USUAL_ROWS = 16
"""Rows of a decode step that the layout of weights is chosen for; any other number works on it too."""


def packs(weight: torch.Tensor) -> bool:
    """Whether there is such a layout: in bfloat16 on a CPU that multiplies in it."""
    kernels: Any = torch.ops.mkldnn
    library: Any = torch.backends.mkldnn
    fitting = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
    return bool(fitting and library.is_available() and kernels._is_mkldnn_bf16_supported())


class PackedLinear:
    """`weight`: [out, in]. It is kept as it is and, where there is one, in the kernel's layout once more: laid out anew
    for every product, a step of 16 rows takes nearly twice as long."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._kernels: Any = torch.ops.mkldnn
        self._bias = bias
        self._packed = self._kernels._reorder_linear_weight(weight, USUAL_ROWS) if packs(weight) else None
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, out]."""
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias)
        out: torch.Tensor = self._kernels._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def onto(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The same without its bias, added to `out` [tokens, out]."""
        if self._packed is None:
            return out.addmm_(x, self._weight.t())
        added: torch.Tensor = self._kernels._linear_pointwise.binary(x, out, self._packed, None, "add")
        return added


class SeparateLinears:
    """Layers whose weights are quantised, each multiplied by its own kernel."""

    def __init__(self, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self._layers = layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, Σ out]."""
        outs = [layer(x) for layer in self._layers]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)
