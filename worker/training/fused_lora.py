"""Frozen linear layers that share one input, with LoRA (Hu et al., 2021): forward and backward without autograd.

The caller of `forward` saves what `backward` needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """`lora_A`: [rank, in_features]; `lora_B`: [out_features, rank]."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A frozen linear layer, dense or in 4 bits, with or without LoRA."""

    base: nn.Module
    lora: LoraWeights | None

    @classmethod
    def of(cls, module: Any) -> "LoraLinear":
        if not hasattr(module, "lora_A"):
            return cls(module, None)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        return cls(module.get_base_layer(), LoraWeights(a, b, module.scaling["default"]))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out_features, in_features]; a 4-bit weight is dequantised for this one use."""
        stored: Any = self.base.weight
        dense: torch.Tensor = (
            dequantize_4bit(stored.data, stored.quant_state) if isinstance(self.base, Linear4bit) else stored
        )
        return dense.to(dtype)


class FusedLoraLinear:
    """Projections of one input [num_tokens, in_features], such as q, k and v.

    One product computes their LoRA down-projections, and they share one dropout mask.
    """

    def __init__(self, *modules: Any) -> None:
        self._projections = [LoraLinear.of(module) for module in modules]
        self._loras = [p.lora for p in self._projections if p.lora is not None]
        self._ranks = [lora.lora_A.shape[0] for lora in self._loras]
        self._width = int(modules[0].in_features)
        self.parameters = [parameter for lora in self._loras for parameter in (lora.lora_A, lora.lora_B)]
        self.dropout = max((_dropout_of(module) for module in modules), default=0.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(each projection's output, [num_tokens, out_features]; the down-projections, [num_tokens, Σ rank]).

        `mask`: bool [num_tokens, in_features], the features that dropout leaves to LoRA; empty without dropout.
        """
        down = self._drop(x, mask) @ self._stacked_lora_A(x.dtype).t() if self._loras else x.new_empty(x.shape[0], 0)
        parts = iter(torch.split(down, self._ranks, 1))
        outputs = []
        for projection in self._projections:
            bias: Any = projection.base.bias
            output = functional.linear(x, projection.weight(x.dtype), bias)
            if (lora := projection.lora) is not None:
                output.addmm_(next(parts), lora.lora_B.to(x.dtype).t(), alpha=lora.scale)
            outputs.append(output)
        return outputs, down

    def backward(
        self, x: torch.Tensor, mask: torch.Tensor, down: torch.Tensor, grads: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(gradients of `parameters`, those of the down-projections) from the outputs' gradients."""
        if not self._loras:
            return [], down
        adapted = [grad for grad, p in zip(grads, self._projections, strict=True) if p.lora is not None]
        parts = torch.split(down, self._ranks, 1)
        ups = [(g.t() @ part).mul_(lo.scale) for g, part, lo in zip(adapted, parts, self._loras, strict=True)]
        d_down = torch.cat([(g @ lo.lora_B).mul_(lo.scale) for g, lo in zip(adapted, self._loras, strict=True)], 1)
        downs = torch.split(d_down.t() @ self._drop(x, mask), self._ranks)
        return [gradient for pair in zip(downs, ups, strict=True) for gradient in pair], d_down

    def input_gradient(self, grads: Sequence[torch.Tensor], d_down: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The gradient of x, from those of the outputs and of the down-projections."""
        first, *others = zip(grads, self._projections, strict=True)
        total = first[0] @ first[1].weight(d_down.dtype)
        for grad, projection in others:
            total.addmm_(grad, projection.weight(grad.dtype))
        if not self._loras:
            return total
        if not mask.numel():
            return total.addmm_(d_down, self._stacked_lora_A(d_down.dtype))
        return total.add_(self._drop(d_down @ self._stacked_lora_A(d_down.dtype), mask))

    def draw_dropout_mask(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A dropout mask for an input with as many tokens as `x`."""
        if not self.dropout:
            return x.new_empty(0, dtype=torch.bool)
        count = x.shape[0] * self._width
        # Four features share one 64-bit draw, sixteen bits each: on a CPU drawing is the cost of dropout.
        draws = torch.empty(-(-count // 4), dtype=torch.long, device=x.device).random_(
            -(2**63), None, generator=generator
        )
        threshold = round(self.dropout * 2**16) - 2**15
        return (draws.view(torch.int16)[:count] >= threshold).view(x.shape[0], self._width)

    def _drop(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (x * mask).mul_(1 / (1 - self.dropout)) if mask.numel() else x

    def _stacked_lora_A(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([lora.lora_A.detach() for lora in self._loras]).to(dtype)


def _dropout_of(module: Any) -> float:
    return float(getattr(module.lora_dropout["default"], "p", 0.0)) if hasattr(module, "lora_dropout") else 0.0
