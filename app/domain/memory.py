"""What training takes of a device's memory, part by part, from sizes alone. Pure arithmetic: no tensors, no device.

One-sided by intent: never below what a run is seen to take, and at most a quarter above, but for the smallest jobs
on a CPU. `docs/plan.md` has the measurements. The terms follow `worker.training`: what
`llama_forward.SavedActivations` holds, what `master_weights` and `loss` allocate.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from app.domain.architectures import Architecture
from app.domain.frozen import Frozen
from app.domain.specs import TrainSpec
from app.domain.trainables import (
    count_llama_forward_bytes,
    count_trainable_parameters,
    count_transformers_bytes,
    get_rank,
    uses_llama_forward,
)
from app.domain.tuning_methods import LoraAdapter, Quantization

FLOAT32_BYTES = 4
"""Bytes of a float32: masters, their summed gradients, and each of AdamW's two moments."""

LOSS_CHUNK = 512
"""The loss computes the logits of this many labelled positions at a time."""

KEEP_DEQUANTIZED_UP_TO = 2**30
"""A CPU keeps a quantised base dequantised, if its weights have at most this many bytes on disk."""

PLAIN_ATTENTION_UP_TO = 1_024
"""A CPU computes attention by plain products for rows of at most this many tokens: its fused kernel is two to four
times slower at 160 tokens. Longer rows, and GPUs, take the fused kernel, whose memory does not grow with the square of
the length."""

QUERY_BLOCK = 128
"""Plain attention computes the scores of about this many queries at a time. It skips the keys behind them: a third of
the work at 350 tokens."""

TOKEN_MULTIPLE = 32
"""Our Llama forward pads a micro-batch to a multiple of this many tokens. Each new shape costs kernels that are
compiled for it, and memory: blocks of ever new sizes fit into no hole that others left."""

PROCESS_BYTES = {"cpu": 1_500 << 20, "gpu": 1_100 << 20}
"""What a process takes beside its tensors: on a CPU the libraries, what loading left in the heap and kernels made for
each shape, on a GPU context, kernels and workspaces."""

FRAGMENTATION = {"cpu": 0.30, "gpu": 0.20}
"""What the allocator cannot give out again, as a share of what comes and goes: a C library's more than torch's own."""


class MemoryEstimate(Frozen):
    """Bytes by part, and `total`, the peak.

    `activations`: what the forward pass keeps and the working memory of the layer whose gradient is computed.
    `logits`, that working memory with `quantization_buffers`, and `checkpoint` (copies of masters and moments) take
    turns, so `total` may be less than the sum. `reserve`: context and fragmentation.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    quantization_buffers: int
    checkpoint: int
    reserve: int
    total: int


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """The largest micro-batch: its tokens, those of its longest row, and its positions with a loss."""

    tokens: int
    longest: int
    labelled: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What of a device decides how much is taken. `compute`: bytes of the number format that products are in."""

    kind: Literal["cpu", "gpu"]
    compute: int


GPU16 = Machine("gpu", 2)


def estimate_memory(
    sizes: Architecture, spec: TrainSpec, load: MicroBatchSize, machine: Machine, *, recompute: bool, stored: int
) -> MemoryEstimate:
    """What training by `spec` takes at its peak. `stored`: bytes of the base's weights on disk."""
    if uses_llama_forward(sizes, spec):
        load = replace(load, tokens=load.tokens + -load.tokens % TOKEN_MULTIPLE)
    trained = count_trainable_parameters(sizes, spec)
    compute = machine.compute
    whole = spec.adapter is None
    packed = None if machine.kind == "cpu" and stored <= KEEP_DEQUANTIZED_UP_TO else spec.quantization
    persistent = {
        "weights": _weights(sizes, packed, compute),
        "adapter": trained * (FLOAT32_BYTES if whole else FLOAT32_BYTES + compute),
        "gradients": trained * (FLOAT32_BYTES + compute),
        "optimizer": trained * 2 * FLOAT32_BYTES,
    }
    layer = _layer(sizes, spec, load, compute)
    kept = _kept(sizes, layer, load, compute, recompute=recompute) + _places(sizes, load, machine)
    working = _working(sizes, spec, load, machine) + (load.tokens * layer if recompute else 0)
    buffers = _unpacked(sizes, packed, compute) + _composed(sizes, spec, compute)
    logits = _logits(sizes, load, compute)
    checkpoint = trained * 3 * FLOAT32_BYTES
    moving = max(kept + max(logits, working + buffers), checkpoint)
    reserve = PROCESS_BYTES[machine.kind] + int(FRAGMENTATION[machine.kind] * moving)
    return MemoryEstimate(
        **persistent,
        activations=kept + working,
        logits=logits,
        quantization_buffers=buffers,
        checkpoint=checkpoint,
        reserve=reserve,
        total=sum(persistent.values()) + moving + reserve,
    )


def _weights(sizes: Architecture, packed: Quantization | None, compute: int) -> int:
    """4 bits: blocks of 64 with a scale each, a float32 or, quantised again, a byte and a float32 for 256 of them.
    8 bits: a float32 for every row."""
    linear, others = sizes.linear_parameters, sizes.other_parameters * compute
    if packed is None:
        return linear * compute + others
    if packed.bits == 8:
        rows = sizes.layers * sum(outputs for _, outputs in sizes.linears.values())
        return linear + rows * 4 + others
    blocks = linear // 64
    return linear // 2 + (blocks + blocks // 64 if packed.double_quant else blocks * 4) + others


def _unpacked(sizes: Architecture, packed: Quantization | None, compute: int) -> int:
    """One layer's weight in the format of products, and its scales in float32."""
    if packed is None:
        return 0
    largest = max(inputs * outputs for inputs, outputs in sizes.linears.values())
    return largest * compute + largest // 16


def _composed(sizes: Architecture, spec: TrainSpec, compute: int) -> int:
    """DoRA adds base and adapter up to see the norm of the whole weight, and again for its gradient."""
    if not (isinstance(spec.adapter, LoraAdapter) and spec.adapter.use_dora):
        return 0
    largest = max(inputs * outputs for inputs, outputs in sizes.linears.values())
    return largest * (8 + 4 * compute)


def _layer(sizes: Architecture, spec: TrainSpec, load: MicroBatchSize, compute: int) -> int:
    """Bytes a token that one layer saves. Transformers' own forward also has an attention mask over all tokens."""
    if uses_llama_forward(sizes, spec):
        return count_llama_forward_bytes(sizes, spec, compute)
    return count_transformers_bytes(sizes, spec, compute) + compute * load.tokens


def _kept(sizes: Architecture, layer: int, load: MicroBatchSize, compute: int, *, recompute: bool) -> int:
    """What the forward pass keeps: of every layer all it needs, or with `recompute` only its input.

    Beside that the last norm's float32 input, hidden states, and of the positions with a loss a copy and its gradient.
    """
    width = compute * sizes.hidden
    layers = sizes.layers * (width if recompute else layer)
    return load.tokens * (layers + 4 * sizes.hidden + width) + load.labelled * 2 * width


def _working(sizes: Architecture, spec: TrainSpec, load: MicroBatchSize, machine: Machine) -> int:
    """What a layer's backward pass takes while it runs: the more of its gated unit and its attention, gradients of its
    down-projections and of its parameters."""
    hidden, queries, keys, inner = sizes.hidden, sizes.query_width, sizes.key_width, sizes.intermediate
    gated = load.tokens * (machine.compute * 3 * (inner + hidden) + 12 * hidden)
    streams = load.tokens * machine.compute * (2 * hidden + queries + 3 * (queries + 2 * keys))
    ranks = load.tokens * machine.compute * 2 * get_rank(spec) * len(sizes.linears)
    parameters = count_trainable_parameters(sizes, spec) // sizes.layers * machine.compute
    return max(gated, streams + _scores(sizes, load, machine)) + ranks + parameters


def _scores(sizes: Architecture, load: MicroBatchSize, machine: Machine) -> int:
    """Attention of one row. A fused kernel holds no scores, but gradients of each head's keys and values."""
    fused = load.longest * machine.compute * 5 * sizes.query_width
    if machine.kind == "gpu":
        return fused
    row = min(load.longest, PLAIN_ATTENTION_UP_TO)
    rounded = machine.compute if machine.compute < 4 else 0
    sums = (
        row * 4 * 2 * (sizes.query_width + sizes.key_width)
    )  # the row's gradients, in float32, and its queries once more
    return max(fused, sizes.heads * query_block(row) * row * (12 + rounded) + sums)


def query_block(row: int) -> int:
    """How many queries of a row of `row` tokens are one block: equal blocks of about QUERY_BLOCK."""
    return math.ceil(row / max(1, round(row / QUERY_BLOCK)))


def _places(sizes: Architecture, load: MicroBatchSize, machine: Machine) -> int:
    """Where tokens stand and which sees which, for the whole update: ids, rotary angles and masks.

    On a CPU a mask is in float32 and there once for each query head of a group: for each block of queries over the keys
    of the same block, and for a branch over those of its whole row.
    """
    angles = load.tokens * (2 * sizes.head_dim * machine.compute + 4 * 8)
    if machine.kind == "gpu":
        return angles + load.tokens * load.longest
    row = min(load.longest, PLAIN_ATTENTION_UP_TO)
    return angles + (load.tokens + row) * query_block(row) * 4 * (sizes.heads // sizes.kv_heads)


def _logits(sizes: Architecture, load: MicroBatchSize, compute: int) -> int:
    """A chunk's logits, in float32 too, with log-probabilities and the gradients of both; and what goes back from them
    to the hidden states, for the chunk and for all positions."""
    return min(LOSS_CHUNK, load.labelled) * (sizes.vocabulary * (12 + compute) + 2 * sizes.hidden * compute)
