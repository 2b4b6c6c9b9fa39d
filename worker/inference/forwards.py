"""One forward of a model over stored keys and values: transformers' own for any architecture, a lean one for Llama's.

The lean one joins the products that read one input (q, k and v; gate and up) and the LoRA beside them, and runs
fewer kernels. Knows no requests and no caches of prefixes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from worker.architecture import is_llama
from worker.inference.loras import LayerLora, Lora, Mix, PackedLayer, PackedLora
from worker.inference.products import Product
from worker.inference.stack import Stack

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache], torch.Tensor]
"""(ids [rows, n], positions [rows, n], mask [rows or 1, 1, n, visible], store) → the last logits [rows, V] in float32.

`store.layers[i].update(keys, values)` writes the new positions and gives all visible ones.
"""


class StockForward:
    """Transformers' own. An adapter shows in it because PEFT has switched it on inside the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, store: Cache) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=store,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


class LlamaForward:
    """The Llama family's, over the model's own weights, which become views of the joined ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        whole: Any = model
        self._inner, self._head = whole.model, Product(whole.lm_head.weight, whole.lm_head.bias)
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        config = model.config
        self._kv_heads, self._heads = int(config.num_key_value_heads), int(config.num_attention_heads)
        self._layers = [_Layer(module) for module in whole.model.layers]

    def stack(self) -> Stack:
        """Room for adapters over this model."""
        first = self._layers[0]
        return Stack(len(self._layers), first.widths, self._inner.embed_tokens.weight)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        store: Cache,
        mix: Mix | None = None,
    ) -> torch.Tensor:
        states = self._inner.embed_tokens(ids)
        cos, sin = (angles.chunk(2, -1)[0][:, :, None] for angles in self._inner.rotary_emb(states, positions))
        group = self._heads // self._kv_heads
        hidden = torch.zeros(mask.shape, dtype=states.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        mask = hidden.repeat(1, 1, group, 1)  # the queries of a group stand one behind the other
        loras, chosen = mix or Mix([LayerLora()] * len(self._layers))
        for layer, kept, lora in zip(self._layers, store.layers, loras, strict=True):
            states = layer.run(states, (cos, sin), mask, kept, lora, chosen, self._kv_heads)
        logits: torch.Tensor = self._head(self._inner.norm(states[:, -1])).float()
        return logits


class _Joined:
    """Linear layers of one input as one: their weights become views of its rows."""

    def __init__(self, *modules: Any) -> None:
        weight = torch.cat([module.weight for module in modules])
        bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
        start = 0
        for module in modules:
            end = start + module.weight.shape[0]
            module.weight = nn.Parameter(weight[start:end], requires_grad=False)
            start = end
        self._product = Product(weight, bias)
        self.widths = (weight.shape[1], weight.shape[0])

    def __call__(self, x: torch.Tensor, lora: Lora | PackedLora | None, chosen: torch.Tensor | None) -> torch.Tensor:
        """[tokens, in] → [tokens, Σ out]. `chosen`: as in `Mix`."""
        out = self._product(x)
        if lora is None:
            return out
        down = lora.down(x)
        if chosen is not None:
            down.view(*chosen.shape[:2], -1).mul_(chosen)
        return lora.up(down, out)


class _Layer:
    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._norm_in, self._norm_middle = module.input_layernorm, module.post_attention_layernorm
        self._qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = _Joined(attention.o_proj)
        self._gate_up = _Joined(mlp.gate_proj, mlp.up_proj)
        self._down = _Joined(mlp.down_proj)
        self._width, self._scaling = int(attention.head_dim), float(attention.scaling)
        self.widths = [joined.widths for joined in (self._qkv, self._o, self._gate_up, self._down)]

    def run(
        self,
        states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        kept: Any,
        lora: LayerLora | PackedLayer,
        chosen: torch.Tensor | None,
        kv_heads: int,
    ) -> torch.Tensor:
        rows, length, _ = states.shape
        x = states.flatten(0, 1)
        heads = self._qkv(self._norm_in(x), lora.qkv, chosen).view(rows, length, -1, self._width)
        turned = _rotate(heads[:, :, :-kv_heads], *angles)
        q, k = turned[:, :, :-kv_heads], turned[:, :, -kv_heads:]
        keys, values = kept.update(k.transpose(1, 2), heads[:, :, -kv_heads:].transpose(1, 2))
        grouped = q.reshape(rows, length, kv_heads, -1, self._width).permute(0, 2, 3, 1, 4).flatten(2, 3)
        seen = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self._scaling)
        seen = seen.view(rows, kv_heads, -1, length, self._width).permute(0, 3, 1, 2, 4).reshape(rows * length, -1)
        x = self._o(seen, lora.o, chosen).add_(x)
        gate, up = self._gate_up(self._norm_middle(x), lora.gate_up, chosen).chunk(2, -1)
        out = self._down(functional.silu(gate).mul_(up), lora.down, chosen).add_(x)
        return out.view(states.shape)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (first, second), (left, right) = heads.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return turned


def lean_forward(model: PreTrainedModel) -> LlamaForward | None:
    """The lean forward where the model's layers are Llama's, and dense."""
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    dense = all(type(module) is nn.Linear for module in linears)
    return LlamaForward(model) if is_llama(model.config) and dense else None
