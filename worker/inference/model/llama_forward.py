"""Our own forward of the Llama family (Llama, Mistral, Qwen2), over transformers' weights and our KV cache.

It fuses the linear layers that share an input (q, k, v; gate, up) and their LoRA, and launches fewer kernels. Where it
can, it decodes by CUDA graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from worker.architecture import is_llama
from worker.inference.cache.cuda_graphs import CapturableStep, Capture, CudaGraphCapturer
from worker.inference.cache.forward_batch import BatchSegment, ForwardBatch, decode_segment
from worker.inference.cache.kv_cache import KVCache, LayerKVCache, power_of_two
from worker.inference.model.adapter_slots import AdapterSlots
from worker.inference.model.attention import Attention
from worker.inference.model.batch_invariance import product_shapes
from worker.inference.model.linear import PackedLinear, SeparateLinears
from worker.inference.model.lora import LayerLora, LoraBatch, LoraPair, PackedLayerLora, PackedLoraPair, read_lora

MIN_TOKENS = 4
"""Of a step on a CPU: products over four rows take less time than over two."""


class LlamaForward:
    """The model's forward. Dense layers are fused; the model's own weights become views of the fused ones.

    With `capture`, a step without prefill chunks is captured as a CUDA graph and replayed. It is padded to a power of
    two of rows, so cache rows behind the decoding ones must hold nothing of value.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        causal_lm: Any = model
        self._inner, self._head = causal_lm.model, PackedLinear(causal_lm.lm_head.weight, causal_lm.lm_head.bias)
        self._embed = causal_lm.model.embed_tokens  # PEFT may replace it by an adapter's
        self._like: torch.Tensor = causal_lm.model.embed_tokens.weight
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._layers = [_DecoderLayer(module) for module in causal_lm.model.layers]
        self._norm = _RMSNorm(causal_lm.model.norm)
        self._on_cpu = self._like.device.type == "cpu"
        self._token_multiple = product_shapes(self._like).token_multiple
        self._capture = capture
        self._identity = object()  # in a KV cache's graphs, which may outlive this model

    def create_slots(self) -> AdapterSlots:
        """Empty adapter slots over this model."""
        is_steady = self._capture is not None
        return AdapterSlots(len(self._layers), self._layers[0].widths, self._like, steady=is_steady)

    def read_lora(self, config: LoraConfig, weights: dict[str, torch.Tensor]) -> list[LayerLora] | None:
        """As `lora.read_lora`, for this model's layers."""
        return read_lora(config, weights, self._linears, self._like.dtype)

    def __call__(
        self, batch: ForwardBatch, cache: KVCache, loras: LoraBatch | None = None, *, may_capture: bool = True
    ) -> torch.Tensor:
        """Logits [num_logits, vocab], float32."""
        is_stable = loras is None or loras.slots is not None  # an adapter's own weights may move
        loras = loras or LoraBatch([LayerLora()] * len(self._layers))
        if self._capture is not None and batch.is_decode_only and is_stable:
            return self._replay(self._capture, batch, cache, loras, may_capture)
        if loras.other_adapter_mask is not None:
            num_tokens = len(batch.token_ids)
            mask = loras.other_adapter_mask.repeat_interleave(batch.tokens_per_row, 0, output_size=num_tokens)
            loras = loras._replace(other_adapter_mask=self._pad(mask))
        token_ids, positions, indices = map(self._pad, (batch.token_ids, batch.positions, batch.logits_indices))
        logits = self._logits(token_ids, positions, batch.segments, cache, loras, indices)
        return logits[: len(batch.logits_indices)].float()

    def _pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """On a CPU, pad to the multiple of tokens that batch-invariant products need (decision 16), at least 4. What is
        computed for the padding is discarded."""
        missing = max(MIN_TOKENS - len(tokens), -len(tokens) % self._token_multiple) if self._on_cpu else 0
        return torch.cat([tokens, tokens.new_zeros(missing, *tokens.shape[1:])]) if missing else tokens

    def _logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        segments: Sequence[BatchSegment],
        cache: KVCache,
        loras: LoraBatch,
        logits_indices: torch.Tensor | slice,
    ) -> torch.Tensor:
        """[num_logits, vocab] from `token_ids` and `positions` [num_tokens]. Here `other_adapter_mask` has a row for
        each token."""
        x = self._embed(token_ids)  # [num_tokens, hidden_size]
        cos_sin = _rotary_factors(*self._inner.rotary_emb(x[None], positions[None]))
        attention = Attention(segments, x.new_zeros(len(x), *self._layers[0].attention_shape))
        for layer, layer_cache, lora in zip(self._layers, cache.layers, loras.layers, strict=True):
            x = layer(x, cos_sin, attention, layer_cache, lora, loras.other_adapter_mask)
        return self._head(self._norm(x[logits_indices]))

    def _replay(
        self, capture: Capture, batch: ForwardBatch, cache: KVCache, loras: LoraBatch, may_capture: bool
    ) -> torch.Tensor:
        num_rows = power_of_two(len(batch.token_ids))
        num_visible = batch.segments[0].mask.shape[-1]

        def work(token_ids: torch.Tensor, positions: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
            masked = loras._replace(other_adapter_mask=mask[0] if mask else None)
            segments = [decode_segment(positions, num_visible)]
            return self._logits(token_ids, positions, segments, cache, masked, slice(None)).float()

        mask = [] if loras.other_adapter_mask is None else [loras.other_adapter_mask]
        inputs = [batch.token_ids, batch.positions, *mask]
        buffer, _ = loras.slots or (None, 0)
        key = (num_rows, num_visible, loras.slots)
        step = cache.graphs.get_or_create(
            (self._identity, buffer), key, lambda: CapturableStep(capture, num_rows, inputs)
        )
        return step(work, inputs, (0, 0, True)[: len(inputs)], may_capture)


class _FusedLinear:
    """Linear layers that share an input, and their LoRA."""

    def __init__(self, *modules: Any) -> None:
        self._linear = _fuse(modules) if all(map(_is_dense, modules)) else SeparateLinears(modules)
        self.widths = (modules[0].in_features, sum(module.out_features for module in modules))

    def __call__(
        self, x: torch.Tensor, lora: LoraPair | PackedLoraPair | None, other_adapter_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, Σ out]. `other_adapter_mask`: [num_tokens, num_slots, 1]."""
        out = self._linear(x)
        if lora is None:
            return out
        down = lora.down(x)  # [num_tokens, num_slots · Σ rank]
        if other_adapter_mask is not None:  # filled, not multiplied by 0: 0 · inf of another adapter would be NaN
            down.view(*other_adapter_mask.shape[:2], -1).masked_fill_(other_adapter_mask, 0)
        return lora.add_up(out, down)


def _is_dense(module: Any) -> bool:
    return type(module) is nn.Linear  # bitsandbytes' quantised layers are subclasses


def _fuse(modules: Sequence[Any]) -> PackedLinear:
    """Several layers as one. Their weights become views of its rows."""
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    start = 0
    for module in modules:
        end = start + module.out_features
        module.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return PackedLinear(weight, bias)


class _RMSNorm:
    """RMSNorm (arXiv:1910.07467) with transformers' roundings, in half as many kernels."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight
        self._epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32, device=self._weight.device)
        self._mean_factor = 1 / len(self._weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] → [num_tokens, hidden_size]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=self._mean_factor).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self._weight)


class _DecoderLayer:
    """`attention_shape`: (num_kv_heads, query heads a kv head, head_dim)."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._input_norm = _RMSNorm(module.input_layernorm)
        self._post_attention_norm = _RMSNorm(module.post_attention_layernorm)
        self._qkv = _FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = _FusedLinear(attention.o_proj)
        self._gate_up = _FusedLinear(mlp.gate_proj, mlp.up_proj)
        self._down = _FusedLinear(mlp.down_proj)
        head_dim, self._scaling = int(attention.head_dim), float(attention.scaling)
        num_kv_heads, num_heads = (linear.out_features // head_dim for linear in (attention.k_proj, attention.q_proj))
        self.attention_shape = num_kv_heads, num_heads // num_kv_heads, head_dim
        self._split = num_heads + num_kv_heads, num_kv_heads
        self.widths = [linear.widths for linear in (self._qkv, self._o, self._gate_up, self._down)]

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: Sequence[torch.Tensor],
        attention: Attention,
        cache: LayerKVCache,
        lora: LayerLora | PackedLayerLora,
        other_adapter_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] → [num_tokens, hidden_size]."""
        qkv = self._qkv(self._input_norm(x), lora.qkv, other_adapter_mask)
        heads = qkv.view(len(x), -1, self.attention_shape[-1])  # [num_tokens, all heads, head_dim]
        qk, v = torch.split_with_sizes(heads, self._split, 1)
        attn_out = attention(_rotate(qk, *cos_sin), v, self._scaling, cache)
        x = self._o(attn_out, lora.o, other_adapter_mask).add_(x)
        gate, up = self._gate_up(self._post_attention_norm(x), lora.gate_up, other_adapter_mask).chunk(2, -1)
        return self._down(functional.silu(gate).mul_(up), lora.down, other_adapter_mask).add_(x)


def _rotary_factors(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE factors for all heads of a token, [num_tokens, 1, head_dim], from transformers' [1, num_tokens, head_dim].
    The first half of the sines is negated, to match the swapped halves in `_rotate`."""
    first, second = sin[0].chunk(2, -1)
    return cos[0][:, None], torch.cat([-first, second], -1)[:, None]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv:2104.09864) of [num_tokens, num_heads, head_dim]."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos, swapped, sin)


def build_llama_forward(model: PreTrainedModel) -> LlamaForward | None:
    """Our own forward, if the model's layers are Llama's and its linear layers dense or quantised; else None."""
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    if not (is_llama(model.config) and all(isinstance(module, nn.Linear) for module in linears)):
        return None
    return LlamaForward(model, CudaGraphCapturer() if _can_be_captured(model, linears) else None)


def _can_be_captured(model: PreTrainedModel, linears: Sequence[Any]) -> bool:
    """Whether a CUDA graph can hold its steps: on a GPU, if no kernel depends on values that the CPU must read first.
    8-bit layers look for outliers, and stretched RoPE looks at the sequence's length."""
    causal_lm: Any = model
    is_stretched = causal_lm.model.rotary_emb.rope_type in ("dynamic", "longrope")
    is_8_bit = any(module.weight.dtype is torch.int8 for module in linears)
    return causal_lm.device.type == "cuda" and not is_stretched and not is_8_bit
