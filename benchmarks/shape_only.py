"""Runs the training recipe's update on the meta device, at the sizes of models that do not fit here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from torch import nn
from transformers import LlamaForCausalLM

from app.domain.architectures import Architecture
from app.domain.attempts import EncodedRow
from benchmarks.live import LiveBytes, bytes_of, kept_for_backward
from benchmarks.random_base import config_of
from worker.training.batches import MicroBatch, collate
from worker.training.llama_forward import build_training_forward
from worker.training.loss import backward_loss
from worker.training.master_weights import MasterWeights

META = torch.device("meta")
COMPUTE = torch.bfloat16


@dataclass(frozen=True)
class Seen:
    """Bytes: what lives from before the update on, what a forward pass keeps, and the most that an update adds."""

    weights: int
    trained: int
    kept: int
    growth: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.growth


def rows_of(tokens: int, length: int, labelled: float) -> MicroBatch:
    """A batch of whole rows of `length` tokens, of which the share `labelled` carries a loss."""
    ids = tuple(5 for _ in range(length))
    spans = ((length - max(1, round(labelled * length)), length),)
    return collate([EncodedRow(line=1, ids=ids, trained=spans)] * (tokens // length))


def run_update(
    sizes: Architecture, config: PeftConfig, batch: MicroBatch, *, recompute: bool, packed: bool, stock: bool
) -> Seen:
    """One update of the recipe over a model of these sizes.

    `packed`: whether its linear layers are in NF4. `stock`: whether transformers' own form runs, not the fast one.
    """
    adapted, model = shapes_of(sizes, config, packed=packed)
    there = batch.to(META)
    fast = None if stock else build_training_forward(adapted, model.base_model, recompute=recompute)
    hidden = fast or transformers_forward(model, recompute=recompute)
    weights = bytes_of(_frozen(model))
    masters = MasterWeights({n: p for n, p in adapted.named_parameters() if p.requires_grad}, COMPUTE)
    optimizer = torch.optim.AdamW([masters.flat], lr=1e-4)
    optimizer.step()  # makes its state
    moments = [t for t in optimizer.state[masters.flat].values() if t.ndim]
    computed = [p for p in adapted.parameters() if p.requires_grad]
    gradients = [p.grad for p in computed if p.grad is not None]
    trained = bytes_of([masters.flat, masters.gradient, *moments, *computed, *gradients])
    held = {p.untyped_storage()._cdata for p in [*adapted.parameters(), *adapted.buffers()]}
    with kernels_of_a_gpu(), LiveBytes() as live:
        with kept_for_backward(held) as kept:
            states = hidden(there)
        backward_loss(states, model.lm_head, there, 1.0)
        del states
        masters.collect()
        optimizer.step()
        _snapshot = masters.by_name(), [moment.clone() for moment in moments]  # as a checkpoint does
    return Seen(weights, trained, sum(kept.values()), live.peak)


def shapes_of(
    sizes: Architecture, config: PeftConfig, *, packed: bool, compute: torch.dtype = COMPUTE
) -> tuple[PeftModel, Any]:
    """(the adapted model, the model itself), all of it without storage; the adapter's own parameters in `compute`."""
    with META:
        model: Any = LlamaForCausalLM(config_of(sizes))
        model = model.to(compute)
        if packed:
            for layer in model.model.layers:
                _pack(layer.self_attn, compute)
                _pack(layer.mlp, compute)
        model.requires_grad_(False)
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(compute)
    adapted.train()
    assert isinstance(adapted, PeftModel)
    return adapted, model


def _pack(block: nn.Module, compute: torch.dtype) -> None:
    for name, linear in list(block.named_children()):
        if isinstance(linear, nn.Linear):
            untyped: Any = Linear4bit
            packed = untyped(linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4")
            packed.weight = _packed_weight(linear.weight, compute)
            packed.compute_dtype, packed.compute_type_is_set = compute, True
            if linear.bias is not None:
                packed.bias = linear.bias
            setattr(block, name, packed)


def _packed_weight(weight: torch.Tensor, compute: torch.dtype) -> Params4bit:
    """What `quantize_4bit` with double quantisation makes of a weight."""
    blocks = weight.numel() // 64
    state: Any = QuantState
    outer = state(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=compute,
        offset=torch.empty(()),
        state2=state(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32),
    )
    data = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8)
    made: Any = Params4bit
    packed: Params4bit = made(data, requires_grad=False, quant_state=outer, bnb_quantized=True)
    return packed


def _frozen(model: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax)


def transformers_forward(model: Any, *, recompute: bool) -> Any:
    """As `worker.training.model` has it for what llama_forward does not support."""
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    def hidden(batch: MicroBatch) -> torch.Tensor:
        from worker.training.packing import batch_attention_mask

        mask = batch_attention_mask(batch.rows, META)[None, None]
        asked = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "attention_mask": mask}
        states: torch.Tensor = model.base_model(**asked, use_cache=False).last_hidden_state
        return states[0]

    return hidden


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """On the meta device torch would write attention out, all scores of all heads; a GPU has kernels that do not."""
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused):
        yield


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention where there is no mask, else the memory-efficient kernel, whose mask is a bias."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: torch.Tensor = flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return out
    bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~attn_mask, -torch.inf)
    bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    mixed: torch.Tensor = efficient(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
    return mixed
