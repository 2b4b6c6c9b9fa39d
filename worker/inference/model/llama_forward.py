"""One forward of a model over stored keys and values: transformers' own for any architecture, a lean one for Llama's.

The lean one joins the products that read one input (q, k and v; gate and up) and the LoRA beside them, and runs
fewer kernels. Knows no requests and no caches of prefixes.
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
from worker.inference.cache.kv_cache import BatchSegment, ForwardBatch, KVCache, LayerKVCache, decoding, power_of_two
from worker.inference.model.adapter_slots import AdapterSlots
from worker.inference.model.attention import Attention
from worker.inference.model.linear import PackedLinear, SeparateLinears
from worker.inference.model.lora import LayerLora, LoraBatch, LoraPair, PackedLayerLora, PackedLoraPair, read_lora


class TransformersForward:
    """Transformers' own. An adapter shows in it because PEFT has switched it on inside the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def __call__(self, step: ForwardBatch, store: KVCache) -> torch.Tensor:
        """Part by part: rows of different lengths are not padded to one shape."""
        return torch.cat([self._logits(step, part, store) for part in step.parts]).float()

    def _logits(self, step: ForwardBatch, part: BatchSegment, store: KVCache) -> torch.Tensor:
        """Behind each row's last tokens, [rows · kept, V]."""
        output = self._model(
            input_ids=step.ids[part.tokens].view(part.height, -1),
            position_ids=step.positions[part.tokens].view(part.height, -1),
            attention_mask=part.mask,
            past_key_values=store.aim(part),
            use_cache=True,
            logits_to_keep=max(1, part.kept),  # 0 would be all
        )
        logits: torch.Tensor = output.logits
        return logits[:, logits.shape[1] - part.kept :].flatten(0, 1)


PAIR, FEWEST = 2, 4
"""What a step's tokens are a multiple of on a CPU, where a single one is summed in another order (decision 16), and how
many there are at least: over four, its products take less time than over two."""


class LlamaForward:
    """The Llama family's, over the model's own layers. Dense ones are joined; their weights become views of that.

    With `record`, a step that reads no prompts is recorded and replayed. It is rounded up to a power of two of rows, so
    that rows behind those that decode must hold nothing that is wanted.
    """

    def __init__(self, model: PreTrainedModel, record: Capture | None = None) -> None:
        whole: Any = model
        self._inner, self._head = whole.model, PackedLinear(whole.lm_head.weight, whole.lm_head.bias)
        self._embed = whole.model.embed_tokens  # PEFT may put an adapter's in its place
        self._like: torch.Tensor = whole.model.embed_tokens.weight
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._layers = [_Layer(module) for module in whole.model.layers]
        self._norm = _Norm(whole.model.norm)
        self._on_cpu = self._like.device.type == "cpu"
        self._record = record
        self._name = object()  # in a store's recordings, which may outlive a base

    def stack(self) -> AdapterSlots:
        """Room for adapters over this model."""
        return AdapterSlots(len(self._layers), self._layers[0].widths, self._like, steady=self._record is not None)

    def read_lora(self, config: LoraConfig, weights: dict[str, torch.Tensor]) -> list[LayerLora] | None:
        """As `loras.read_lora`, beside this model's layers."""
        return read_lora(config, weights, self._linears, self._like.dtype)

    def __call__(
        self, step: ForwardBatch, store: KVCache, mix: LoraBatch | None = None, *, may_record: bool = True
    ) -> torch.Tensor:
        in_places = mix is None or mix.places is not None  # an adapter's own memory is another's tomorrow
        mix = mix or LoraBatch([LayerLora()] * len(self._layers))
        if self._record is not None and step.reads_nothing and in_places:
            return self._replayed(self._record, step, store, mix, may_record)
        if mix.foreign is not None:
            foreign = mix.foreign.repeat_interleave(step.counts, 0, output_size=len(step.ids))
            mix = mix._replace(foreign=self._folded(foreign))
        ids, positions, wanted = map(self._folded, (step.ids, step.positions, step.wanted))
        return self._logits(ids, positions, step.parts, store, mix, wanted)[: len(step.wanted)].float()

    def _folded(self, rows: torch.Tensor) -> torch.Tensor:
        """In pairs on a CPU, the last ones zeros where need be, for whose answer nobody asks."""
        spare = max(FEWEST - len(rows), -len(rows) % PAIR) if self._on_cpu else 0
        return torch.cat([rows, rows.new_zeros(spare, *rows.shape[1:])]) if spare else rows

    def _logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        parts: Sequence[BatchSegment],
        store: KVCache,
        mix: LoraBatch,
        wanted: torch.Tensor | slice,
    ) -> torch.Tensor:
        """Here the mix's `foreign` is told token by token."""
        x = self._embed(ids)
        angles = _angles(*self._inner.rotary_emb(x[None], positions[None]))
        attention = Attention(parts, x.new_zeros(len(x), *self._layers[0].heads))
        for layer, kept, lora in zip(self._layers, store.layers, mix.layers, strict=True):
            x = layer.run(x, angles, attention, kept, lora, mix.foreign)
        return self._head(self._norm(x[wanted]))

    def _replayed(
        self, record: Capture, step: ForwardBatch, store: KVCache, mix: LoraBatch, may_record: bool
    ) -> torch.Tensor:
        rows = power_of_two(len(step.ids))
        visible = step.parts[0].mask.shape[-1]

        def work(ids: torch.Tensor, positions: torch.Tensor, *foreign: torch.Tensor) -> torch.Tensor:
            mixed = mix._replace(foreign=foreign[0] if foreign else None)
            return self._logits(ids, positions, [decoding(positions, visible)], store, mixed, slice(None)).float()

        inputs = [step.ids, step.positions, *([] if mix.foreign is None else [mix.foreign])]
        generation, _ = mix.places or (None, 0)
        key = (rows, visible, mix.places)
        recording = store.recordings.find((self._name, generation), key, lambda: CapturableStep(record, rows, inputs))
        return recording(work, inputs, (0, 0, True)[: len(inputs)], may_record)


class _FusedLinear:
    """Linear layers of one input, and the LoRA beside them."""

    def __init__(self, *modules: Any) -> None:
        self._product = _joined(modules) if all(map(_is_dense, modules)) else SeparateLinears(modules)
        self.widths = (modules[0].in_features, sum(module.out_features for module in modules))

    def __call__(
        self, x: torch.Tensor, lora: LoraPair | PackedLoraPair | None, foreign: torch.Tensor | None
    ) -> torch.Tensor:
        """[tokens, in] → [tokens, Σ out]. `foreign`: as in `Mix`."""
        out = self._product(x)
        if lora is None:
            return out
        down = lora.down(x)
        if foreign is not None:  # not multiplied by 0: what overflowed in another's adapter would become NaN
            down.view(*foreign.shape[:2], -1).masked_fill_(foreign, 0)
        return lora.up(down, out)


def _is_dense(module: Any) -> bool:
    return type(module) is nn.Linear  # those that keep quantised weights are its subclasses


def _joined(modules: Sequence[Any]) -> PackedLinear:
    """Layers as one: their weights become views of its rows."""
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    start = 0
    for module in modules:
        end = start + module.out_features
        module.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return PackedLinear(weight, bias)


class _Norm:
    """A root-mean-square norm with transformers' roundings, in half as many kernels."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight
        self._epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32, device=self._weight.device)
        self._share = 1 / len(self._weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=self._share).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self._weight)


class _Layer:
    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._norm_in, self._norm_middle = _Norm(module.input_layernorm), _Norm(module.post_attention_layernorm)
        self._qkv = _FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = _FusedLinear(attention.o_proj)
        self._gate_up = _FusedLinear(mlp.gate_proj, mlp.up_proj)
        self._down = _FusedLinear(mlp.down_proj)
        width, self._scaling = int(attention.head_dim), float(attention.scaling)
        kv_heads, heads = (linear.out_features // width for linear in (attention.k_proj, attention.q_proj))
        self.heads = kv_heads, heads // kv_heads, width
        self._split = heads + kv_heads, kv_heads
        self.widths = [fan.widths for fan in (self._qkv, self._o, self._gate_up, self._down)]

    def run(
        self,
        x: torch.Tensor,
        angles: Sequence[torch.Tensor],
        attention: Attention,
        kept: LayerKVCache,
        lora: LayerLora | PackedLayerLora,
        foreign: torch.Tensor | None,
    ) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        heads = self._qkv(self._norm_in(x), lora.qkv, foreign).view(len(x), -1, self.heads[-1])
        qk, v = torch.split_with_sizes(heads, self._split, 1)
        x = self._o(attention(_rotate(qk, *angles), v, self._scaling, kept), lora.o, foreign).add_(x)
        gate, up = self._gate_up(self._norm_middle(x), lora.gate_up, foreign).chunk(2, -1)
        return self._down(functional.silu(gate).mul_(up), lora.down, foreign).add_(x)


def _angles(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers' [1, tokens, head_dim], for all heads of a token; the sines as they meet the swapped halves."""
    first, second = sin[0].chunk(2, -1)
    return cos[0][:, None], torch.cat([-first, second], -1)[:, None]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim], turned by their positions."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos, swapped, sin)


def build_llama_forward(model: PreTrainedModel) -> LlamaForward | None:
    """The lean forward where the model's layers are Llama's, and linear ones dense or quantised."""
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    if not (is_llama(model.config) and all(isinstance(module, nn.Linear) for module in linears)):
        return None
    return LlamaForward(model, CudaGraphCapturer() if _can_be_recorded(model, linears) else None)


def _can_be_recorded(model: PreTrainedModel, linears: Sequence[Any]) -> bool:
    """On a GPU, where no layer looks at numbers before it goes on: as 8-bit ones do for outliers, and rotations that
    are stretched by a sequence's length."""
    whole: Any = model
    stretched = whole.model.rotary_emb.rope_type in ("dynamic", "longrope")
    in_8_bits = any(module.weight.dtype is torch.int8 for module in linears)
    return whole.device.type == "cuda" and not stretched and not in_8_bits
