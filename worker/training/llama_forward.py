"""The Llama family's forward and backward pass in training, for frozen weights with LoRA. Each decoder layer is one
autograd node.

Transformers' layers spend half of an update outside matrix products: a graph node for every small operation, casts
around LoRA, a down-projection for each linear layer. Here layers of one input share a down-projection, and a layer
saves only what its backward pass cannot cheaply compute again. Norms are RMSNorm (Zhang and Sennrich, 2019), the MLP
is SwiGLU (Shazeer, 2020), positions are RoPE (Su et al., 2021).
"""

from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from app.domain.memory import TOKEN_MULTIPLE
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
from worker.training.batches import MicroBatch
from worker.training.fused_lora import FusedLoraLinear
from worker.training.packing import PackedRow


class SavedActivations(NamedTuple):
    """What the backward pass of a layer needs: [num_tokens, …], and heads as `attention` lays them out.

    `inverse_rms_in`, `inverse_rms_middle`: the factors of both RMSNorms in float32, [num_tokens, 1].
    `down_…`: LoRA's down-projections, x @ lora_A.T, [num_tokens, Σ rank].
    `mask_…`: the dropout mask of one input, bool [num_tokens, in_features]; empty without dropout.
    """

    x: torch.Tensor
    inverse_rms_in: torch.Tensor
    down_qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_out: torch.Tensor
    down_o: torch.Tensor
    middle: torch.Tensor
    inverse_rms_middle: torch.Tensor
    down_gate_up: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down_down: torch.Tensor
    mask_qkv: torch.Tensor
    mask_o: torch.Tensor
    mask_gate_up: torch.Tensor
    mask_down: torch.Tensor


class BatchLayout(NamedTuple):
    """The RoPE tables of a batch's tokens, and the spans that attend to themselves alone."""

    rope: Rope
    spans: list[Span]


class LlamaLayer:
    """One decoder layer over the weights of a transformers layer."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._norm_in, self._norm_middle = module.input_layernorm, module.post_attention_layernorm
        self._qkv = FusedLoraLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = FusedLoraLinear(attention.o_proj)
        self._gate_up = FusedLoraLinear(mlp.gate_proj, mlp.up_proj)
        self._down = FusedLoraLinear(mlp.down_proj)
        self._heads = (int(attention.config.num_key_value_heads), int(attention.head_dim))
        self._scaling = float(attention.scaling)
        self._linears = (self._qkv, self._o, self._gate_up, self._down)
        self.parameters = [parameter for linear in self._linears for parameter in linear.parameters]
        self.drops_features = any(linear.dropout for linear in self._linears)

    def forward(self, x: torch.Tensor, layout: BatchLayout, seed: int | None) -> tuple[torch.Tensor, SavedActivations]:
        """x: [num_tokens, hidden_size]. `seed` draws the dropout masks; None means no dropout."""
        masks = self._dropout_masks(x, seed)
        inverse_rms_in = _inverse_rms(x, self._norm_in)
        flat, down_qkv = self._qkv.forward(_rms_norm(x, inverse_rms_in, self._norm_in), masks[0])
        q, k, v = (to_heads(part, *self._heads) for part in flat)
        q, k, v = rotate(q, layout.rope), rotate(k, layout.rope).squeeze(1), v.squeeze(1).contiguous()
        attn_out = to_tokens(attend(q, k, v, layout.spans, self._scaling))
        (attended,), down_o = self._o.forward(attn_out, masks[1])
        middle = attended.add_(x)
        inverse_rms_middle = _inverse_rms(middle, self._norm_middle)
        (gate, up), down_gate_up = self._gate_up.forward(
            _rms_norm(middle, inverse_rms_middle, self._norm_middle), masks[2]
        )
        (out,), down_down = self._down.forward(functional.silu(gate).mul_(up), masks[3])
        attention_side = (x, inverse_rms_in, down_qkv, q, k, v, attn_out, down_o)
        mlp_side = (middle, inverse_rms_middle, down_gate_up, gate, up, down_down)
        return out.add_(middle), SavedActivations(*attention_side, *mlp_side, *masks)

    def _dropout_masks(self, x: torch.Tensor, seed: int | None) -> list[torch.Tensor]:
        """One dropout mask for each input, equal for equal seeds, so that a recomputed forward repeats it."""
        if seed is None:
            return [x.new_empty(0, dtype=torch.bool)] * len(self._linears)
        generator = torch.Generator(x.device).manual_seed(seed)
        return [linear.draw_dropout_mask(x, generator) for linear in self._linears]

    def backward(
        self, saved: SavedActivations, grad: torch.Tensor, layout: BatchLayout, *, wanted: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient of x, or None where it is not `wanted`; gradients of `parameters`) from the output's gradient."""
        d_middle, of_mlp = self._mlp_backward(saved, grad)
        of_o, d_down = self._o.backward(saved.attn_out, saved.mask_o, saved.down_o, [d_middle])
        d_attn_out = self._o.input_gradient([d_middle], d_down, saved.mask_o)
        d_qkv = self._attention_backward(saved, d_attn_out, layout)
        normed = _rms_norm(saved.x, saved.inverse_rms_in, self._norm_in)
        of_qkv, d_down = self._qkv.backward(normed, saved.mask_qkv, saved.down_qkv, d_qkv)
        gradients = [*of_qkv, *of_o, *of_mlp]
        if not wanted:
            return None, gradients
        d_normed = self._qkv.input_gradient(d_qkv, d_down, saved.mask_qkv)
        return _rms_norm_backward(d_normed, saved.x, saved.inverse_rms_in, self._norm_in).add_(d_middle), gradients

    def _mlp_backward(self, saved: SavedActivations, grad: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(gradient behind the attention, gradients of the parameters of gate, up and down)."""
        active = functional.silu(saved.gate)
        of_down, d_down = self._down.backward(active * saved.up, saved.mask_down, saved.down_down, [grad])
        d_product = self._down.input_gradient([grad], d_down, saved.mask_down)
        d_up = active.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(saved.up), saved.gate)
        normed = _rms_norm(saved.middle, saved.inverse_rms_middle, self._norm_middle)
        of_gate_up, d_down = self._gate_up.backward(normed, saved.mask_gate_up, saved.down_gate_up, [d_gate, d_up])
        d_normed = self._gate_up.input_gradient([d_gate, d_up], d_down, saved.mask_gate_up)
        d_middle = _rms_norm_backward(d_normed, saved.middle, saved.inverse_rms_middle, self._norm_middle).add_(grad)
        return d_middle, [*of_gate_up, *of_down]

    def _attention_backward(
        self, saved: SavedActivations, d_attn_out: torch.Tensor, layout: BatchLayout
    ) -> list[torch.Tensor]:
        d_heads = to_heads(d_attn_out, *self._heads)
        d_q, d_k, d_v = attend_backward(d_heads, saved.q, saved.k, saved.v, layout.spans, self._scaling)
        back = layout.rope.transposed()
        return [to_tokens(d) for d in (rotate(d_q, back), rotate(d_k.unsqueeze(1), back), d_v.unsqueeze(1))]


class _LlamaLayerFunction(torch.autograd.Function):
    """A layer in the graph. With `recompute`, only its input is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: LlamaLayer,
        layout: BatchLayout,
        recompute: bool,
        seed: int | None,
        x: torch.Tensor,
        *_parameters: nn.Parameter,
    ) -> torch.Tensor:
        out, saved = layer.forward(x, layout, seed)
        ctx.save_for_backward(*((x,) if recompute else saved))
        ctx.layer, ctx.layout, ctx.seed = layer, layout, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        saved = ctx.layer.forward(saved[0], ctx.layout, ctx.seed)[1] if len(saved) == 1 else SavedActivations(*saved)
        d_x, gradients = ctx.layer.backward(saved, grad.contiguous(), ctx.layout, wanted=ctx.needs_input_grad[4])
        return None, None, None, None, d_x, *gradients


class LlamaTrainingForward:
    """A batch → its hidden states [num_tokens, hidden_size], as transformers' model with LoRA gives them."""

    def __init__(self, model: Any, *, recompute: bool) -> None:
        """`model`: the bare model with embedding, layers and norm; its adapters are in place."""
        self._model = model
        self._layers = [LlamaLayer(module) for module in model.layers]
        self._group = model.config.num_attention_heads // model.config.num_key_value_heads
        self._recompute = recompute

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        ids, positions, rows = _padded(batch)
        states = self._model.embed_tokens(ids)
        cos, sin = (angles[0].chunk(2, -1)[0] for angles in self._model.rotary_emb(states, positions[None]))
        layout = BatchLayout(Rope(cos, sin), spans_of(rows, self._group, states.device))
        node: Any = _LlamaLayerFunction.apply
        for layer in self._layers:
            # Drawn from the global generator, whose state is part of a checkpoint.
            seed = int(torch.randint(2**62, ())) if layer.drops_features and self._model.training else None
            states = node(layer, layout, self._recompute, seed, states, *layer.parameters)
        out: torch.Tensor = self._model.norm(states[: batch.tokens])
        return out


def _padded(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, tuple[PackedRow, ...]]:
    """(ids, positions, rows) of `batch`, padded by a row that nothing reads to a multiple of `TOKEN_MULTIPLE`."""
    missing = -batch.tokens % TOKEN_MULTIPLE
    if not missing:
        return batch.ids, batch.positions, batch.rows
    ids, positions = (functional.pad(numbers, (0, missing)) for numbers in (batch.ids, batch.positions))
    return ids, positions, (*batch.rows, PackedRow(batch.tokens, missing))


def build_training_forward(adapted: nn.Module, model: Any, *, recompute: bool) -> LlamaTrainingForward | None:
    """The forward of `model`, or None where its architecture or its adapter needs transformers' own."""
    return LlamaTrainingForward(model, recompute=recompute) if _is_supported(adapted, model) else None


def _is_supported(adapted: Any, model: Any) -> bool:
    adapter = adapted.peft_config["default"] if hasattr(adapted, "peft_config") else None
    plain = adapter is not None and type(adapter) is LoraConfig and not adapter.use_dora
    return (
        plain
        and is_llama(model.config)
        and all(type(layer) in (nn.Linear, Linear4bit) for layer in _projections(model))
    )


def _projections(model: nn.Module) -> list[nn.Module]:
    found: list[Any] = [module for name, module in model.named_modules() if name.endswith("_proj")]
    return [module.get_base_layer() if hasattr(module, "lora_A") else module for module in found]


# RMSNorm, in float32 inside like transformers'.


def _inverse_rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x.float().square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()


def _rms_norm(x: torch.Tensor, scale: torch.Tensor, norm: Any) -> torch.Tensor:
    return (x.float() * scale).to(x.dtype).mul_(norm.weight)


def _rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, norm: Any) -> torch.Tensor:
    weighted, unit = (grad * norm.weight).float(), x.float() * scale
    along = (weighted * unit).mean(-1, keepdim=True)
    return torch.addcmul(weighted, unit, along, value=-1).mul_(scale).to(x.dtype)
