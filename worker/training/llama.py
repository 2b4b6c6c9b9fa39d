"""Llama-family decoder layers, each one autograd node: forward and backward by hand, for frozen weights and LoRA.

Stock layers spend half of an update outside matrix products: a graph node for every small operation, casts around
LoRA, a down-projection for each linear layer where layers of one input can share it. Here a layer keeps what its
backward pass cannot cheaply compute again, and nothing else. It knows no data, no loss and no optimizer.
"""

from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from worker.architecture import is_llama
from worker.training.attention import (
    Rope,
    Span,
    attend,
    attend_backward,
    rotate,
    spans_of,
    to_heads,
    to_tokens,
)
from worker.training.batches import Batch
from worker.training.fans import Fan
from worker.training.packing import Row

MULTIPLE = 32
"""What a micro-batch's tokens are rounded up to. Each new shape is paid for with kernels that are made for it, and with
memory: blocks of ever new sizes fit into no hole that others left."""


class Kept(NamedTuple):
    """What the backward pass of a layer needs: [tokens, …], and heads as `attention` has them.

    `scale_in`, `scale_middle`: inverse root mean squares in float32, [tokens, 1]. `down_…`: LoRA down-projections.
    `kept_…`: what dropout left of a fan's input, [tokens, in]; empty without dropout.
    """

    x: torch.Tensor
    scale_in: torch.Tensor
    down_qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    down_o: torch.Tensor
    middle: torch.Tensor
    scale_middle: torch.Tensor
    down_gate_up: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down_down: torch.Tensor
    kept_qkv: torch.Tensor
    kept_o: torch.Tensor
    kept_gate_up: torch.Tensor
    kept_down: torch.Tensor


class Places(NamedTuple):
    """Where a batch's tokens stand, and what each row may see."""

    rope: Rope
    spans: list[Span]


class Layer:
    """One decoder layer over the weights of transformers' own."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._norm_in, self._norm_middle = module.input_layernorm, module.post_attention_layernorm
        self._qkv = Fan(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = Fan(attention.o_proj)
        self._gate_up = Fan(mlp.gate_proj, mlp.up_proj)
        self._down = Fan(mlp.down_proj)
        self._heads = (int(attention.config.num_key_value_heads), int(attention.head_dim))
        self._scaling = float(attention.scaling)
        self._fans = (self._qkv, self._o, self._gate_up, self._down)
        self.parameters = [parameter for fan in self._fans for parameter in fan.parameters]
        self.drops = any(fan.dropout for fan in self._fans)

    def forward(self, x: torch.Tensor, places: Places, seed: int | None) -> tuple[torch.Tensor, Kept]:
        """x: [tokens, width]. `seed` names the features that dropout leaves out; None leaves out none."""
        drops = self._drops(x, seed)
        scale_in = _scale(x, self._norm_in)
        flat, down_qkv = self._qkv.forward(_normal(x, scale_in, self._norm_in), drops[0])
        q, k, v = (to_heads(part, *self._heads) for part in flat)
        q, k, v = rotate(q, places.rope), rotate(k, places.rope).squeeze(1), v.squeeze(1).contiguous()
        seen = to_tokens(attend(q, k, v, places.spans, self._scaling))
        (attended,), down_o = self._o.forward(seen, drops[1])
        middle = attended.add_(x)
        scale_middle = _scale(middle, self._norm_middle)
        (gate, up), down_gate_up = self._gate_up.forward(_normal(middle, scale_middle, self._norm_middle), drops[2])
        (out,), down_down = self._down.forward(functional.silu(gate).mul_(up), drops[3])
        attention_side = (x, scale_in, down_qkv, q, k, v, seen, down_o)
        mlp_side = (middle, scale_middle, down_gate_up, gate, up, down_down)
        return out.add_(middle), Kept(*attention_side, *mlp_side, *drops)

    def _drops(self, x: torch.Tensor, seed: int | None) -> list[torch.Tensor]:
        """What dropout leaves, for each fan: the same for the same seed."""
        if seed is None:
            return [x.new_empty(0, dtype=torch.bool)] * len(self._fans)
        generator = torch.Generator(x.device).manual_seed(seed)
        return [fan.draw(x, generator) for fan in self._fans]

    def backward(
        self, kept: Kept, grad: torch.Tensor, places: Places, *, wanted: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient of x, or None where it is not `wanted`; gradients of `parameters`) from the output's gradient."""
        d_middle, of_mlp = self._mlp_backward(kept, grad)
        of_o, d_down = self._o.backward(kept.seen, kept.kept_o, kept.down_o, [d_middle])
        d_seen = self._o.input_gradient([d_middle], d_down, kept.kept_o)
        d_qkv = self._attention_backward(kept, d_seen, places)
        normal = _normal(kept.x, kept.scale_in, self._norm_in)
        of_qkv, d_down = self._qkv.backward(normal, kept.kept_qkv, kept.down_qkv, d_qkv)
        gradients = [*of_qkv, *of_o, *of_mlp]
        if not wanted:
            return None, gradients
        d_normal = self._qkv.input_gradient(d_qkv, d_down, kept.kept_qkv)
        return _normal_backward(d_normal, kept.x, kept.scale_in, self._norm_in).add_(d_middle), gradients

    def _mlp_backward(self, kept: Kept, grad: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(gradient behind the attention, gradients of the parameters of gate, up and down)."""
        active = functional.silu(kept.gate)
        of_down, d_down = self._down.backward(active * kept.up, kept.kept_down, kept.down_down, [grad])
        d_product = self._down.input_gradient([grad], d_down, kept.kept_down)
        d_up = active.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(kept.up), kept.gate)
        normal = _normal(kept.middle, kept.scale_middle, self._norm_middle)
        of_gate_up, d_down = self._gate_up.backward(normal, kept.kept_gate_up, kept.down_gate_up, [d_gate, d_up])
        d_normal = self._gate_up.input_gradient([d_gate, d_up], d_down, kept.kept_gate_up)
        d_middle = _normal_backward(d_normal, kept.middle, kept.scale_middle, self._norm_middle).add_(grad)
        return d_middle, [*of_gate_up, *of_down]

    def _attention_backward(self, kept: Kept, d_seen: torch.Tensor, places: Places) -> list[torch.Tensor]:
        d_heads = to_heads(d_seen, *self._heads)
        d_q, d_k, d_v = attend_backward(d_heads, kept.q, kept.k, kept.v, places.spans, self._scaling)
        back = places.rope.transposed()
        return [to_tokens(d) for d in (rotate(d_q, back), rotate(d_k.unsqueeze(1), back), d_v.unsqueeze(1))]


class _Node(torch.autograd.Function):
    """A layer in the graph. With `recompute`, only its input is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        places: Places,
        recompute: bool,
        seed: int | None,
        x: torch.Tensor,
        *_parameters: nn.Parameter,
    ) -> torch.Tensor:
        out, kept = layer.forward(x, places, seed)
        ctx.save_for_backward(*((x,) if recompute else kept))
        ctx.layer, ctx.places, ctx.seed = layer, places, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        kept = ctx.layer.forward(saved[0], ctx.places, ctx.seed)[1] if len(saved) == 1 else Kept(*saved)
        d_x, gradients = ctx.layer.backward(kept, grad.contiguous(), ctx.places, wanted=ctx.needs_input_grad[4])
        return None, None, None, None, d_x, *gradients


class LlamaBackbone:
    """A batch → its hidden states [tokens, width], as transformers' model with LoRA gives them."""

    def __init__(self, model: Any, *, recompute: bool) -> None:
        """`model`: the bare model with embedding, layers and norm; its adapters are in place."""
        self._model = model
        self._layers = [Layer(module) for module in model.layers]
        self._group = model.config.num_attention_heads // model.config.num_key_value_heads
        self._recompute = recompute

    def __call__(self, batch: Batch) -> torch.Tensor:
        ids, positions, rows = _filled(batch)
        states = self._model.embed_tokens(ids)
        cos, sin = (angles[0].chunk(2, -1)[0] for angles in self._model.rotary_emb(states, positions[None]))
        places = Places(Rope(cos, sin), spans_of(rows, self._group, states.device))
        node: Any = _Node.apply
        for layer in self._layers:
            # Drawn from the global generator, whose state is part of a checkpoint.
            seed = int(torch.randint(2**62, ())) if layer.drops and self._model.training else None
            states = node(layer, places, self._recompute, seed, states, *layer.parameters)
        out: torch.Tensor = self._model.norm(states[: batch.tokens])
        return out


def _filled(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, tuple[Row, ...]]:
    """(ids, positions, rows) of `batch` and of a row behind it that nobody reads, up to a multiple of `MULTIPLE`."""
    missing = -batch.tokens % MULTIPLE
    if not missing:
        return batch.ids, batch.positions, batch.rows
    ids, positions = (functional.pad(numbers, (0, missing)) for numbers in (batch.ids, batch.positions))
    return ids, positions, (*batch.rows, Row(batch.tokens, missing))


def llama_backbone(adapted: nn.Module, model: Any, *, recompute: bool) -> LlamaBackbone | None:
    """The backbone of `model` in this form, or None where its architecture or its adapter needs another."""
    return LlamaBackbone(model, recompute=recompute) if _fits(adapted, model) else None


def _fits(adapted: Any, model: Any) -> bool:
    adapter = adapted.peft_config["default"] if hasattr(adapted, "peft_config") else None
    plain = adapter is not None and type(adapter) is LoraConfig and not adapter.use_dora
    return plain and is_llama(model.config) and all(type(layer) in (nn.Linear, Linear4bit) for layer in _linears(model))


def _linears(model: nn.Module) -> list[nn.Module]:
    found: list[Any] = [module for name, module in model.named_modules() if name.endswith("_proj")]
    return [module.get_base_layer() if hasattr(module, "lora_A") else module for module in found]


# Root-mean-square norms, in float32 inside as transformers has them.


def _scale(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x.float().square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()


def _normal(x: torch.Tensor, scale: torch.Tensor, norm: Any) -> torch.Tensor:
    return (x.float() * scale).to(x.dtype).mul_(norm.weight)


def _normal_backward(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, norm: Any) -> torch.Tensor:
    weighted, unit = (grad * norm.weight).float(), x.float() * scale
    along = (weighted * unit).mean(-1, keepdim=True)
    return torch.addcmul(weighted, unit, along, value=-1).mul_(scale).to(x.dtype)
