"""Estimates the device memory that a training job needs, from sizes alone. Pure arithmetic: no tensors, no device.

The estimate is meant to be 1.0 to 1.25 of a run's measured peak. `docs/plan.md` has the measurements. The terms follow
`worker.training`: the fields of `llama_forward.SavedActivations`, and the tensors that `master_weights` and `loss`
allocate.
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
"""Bytes of a float32. Master weights, their summed gradients and both AdamW moments are in float32."""

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

PROCESS_BYTES = {"cpu": 450 << 20, "gpu": 1_100 << 20}
"""Bytes of a process before its first tensor.

On a CPU: the imported libraries, 104 MiB of them mapped files. On a GPU: the CUDA context, kernels and workspaces.
"""

GPU_FRAGMENTATION = 0.20
"""Share of the temporary memory that torch's CUDA allocator loses to fragmentation."""

KERNEL_BYTES = 225 << 20
"""Bytes that a CPU's heap keeps in use after 24 micro-batches, each of another shape.

Measured: the growth of the heap in use, 225 MB on an Intel Xeon with AMX. Inferred: that these are the kernels that
oneDNN compiles. `ONEDNN_PRIMITIVE_CACHE_CAPACITY` keeps 256 of them, so one would have about 0.9 MB. On an AMD EPYC
without AMX, 0.3 to 0.4 MB a kernel were seen. `docs/log.md` (2026-11-30) has the measurement."""

KERNELS_FULL_AFTER = 5
"""Updates after which the heap holds KERNEL_BYTES of kernels: about 16 micro-batches, each of another shape."""

HOLES = (0.25, 1.0)
"""Bytes of holes in a CPU's heap for each byte of activations and kernels, within a micro-batch: with an empty kernel
cache, and with a full one. A kernel stays where it was allocated, between blocks that come and go. Blocks of
`MMAP_FROM` bytes and more leave no holes."""

MAX_HOLES = 256 << 20
"""A CPU's heap grows by at least this many bytes between micro-batches before its holes are returned to the system.
That happens only above `MemoryEstimate.between_micro_batches`."""

MMAP_FROM = 32 << 20
"""On a CPU, a block of at least this many bytes gets a mapping of its own, and `free` returns it to the system: logits
over a vocabulary, master weights."""


class MemoryEstimate(Frozen):
    """Bytes by purpose, and `total`, the peak.

    `weights`: the base in the process's own memory: packed, dequantised or converted. `mapped_files`: on a CPU, the
    base's files. The system may reclaim their pages, but resident memory includes them.
    `activations`: saved activations, and the working memory of one layer's backward pass. `checkpoint`: copies of
    master weights and moments. `reserve`: the process, compiled kernels and fragmentation. `logits`, the working memory
    with `quantization_buffers`, and `checkpoint` are never in memory together, so `total` may be less than the sum.
    """

    weights: int
    mapped_files: int = 0
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    quantization_buffers: int
    checkpoint: int
    reserve: int
    total: int

    @property
    def between_micro_batches(self) -> int:
        """Bytes between two micro-batches: those of the peak without its logits, which are freed by then."""
        return self.total - self.logits


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """Size of a micro-batch: its tokens, the tokens of its longest row, and its positions with a loss.

    `updates`: how many updates the job has.
    """

    tokens: int
    longest: int
    labelled: int
    updates: int = KERNELS_FULL_AFTER


@dataclass(frozen=True, slots=True)
class Machine:
    """The properties of a device that memory use depends on.

    `compute`: bytes of the number format of matrix products.
    """

    kind: Literal["cpu", "gpu"]
    compute: int


GPU16 = Machine("gpu", 2)


def estimate_memory(
    sizes: Architecture, spec: TrainSpec, batch: MicroBatchSize, machine: Machine, *, recompute: bool, stored: int
) -> MemoryEstimate:
    """Peak memory of training by `spec`. `stored`: bytes of the base's weights on disk."""
    if uses_llama_forward(sizes, spec):
        batch = replace(batch, tokens=batch.tokens + -batch.tokens % TOKEN_MULTIPLE)
    trained = count_trainable_parameters(sizes, spec)
    compute = machine.compute
    is_full = spec.adapter is None
    packed = None if machine.kind == "cpu" and stored <= KEEP_DEQUANTIZED_UP_TO else spec.quantization
    persistent = {
        "weights": _weights(sizes, spec, packed, machine, stored),
        "mapped_files": stored if machine.kind == "cpu" else 0,
        "adapter": trained * (FLOAT32_BYTES if is_full else FLOAT32_BYTES + compute),
        "gradients": trained * (FLOAT32_BYTES + compute),
        "optimizer": trained * 2 * FLOAT32_BYTES,
    }
    layer = _layer(sizes, spec, batch, compute)
    saved = _saved_activations(sizes, layer, batch, compute, recompute=recompute) + _positions_and_masks(
        sizes, batch, machine
    )
    working = _backward_working_memory(sizes, spec, batch, machine) + (batch.tokens * layer if recompute else 0)
    buffers = _dequantization_buffers(sizes, packed, compute) + _dora_buffers(sizes, spec, compute)
    logits = _logits(sizes, batch, compute)
    checkpoint = trained * 3 * FLOAT32_BYTES
    temporary = max(saved + max(logits, working + buffers), checkpoint)
    in_heap = saved + working + buffers + (logits if _loss_block(sizes, batch) < MMAP_FROM else 0)
    reserve = _reserve(machine, batch, temporary, in_heap)
    return MemoryEstimate(
        **persistent,
        activations=saved + working,
        logits=logits,
        quantization_buffers=buffers,
        checkpoint=checkpoint,
        reserve=reserve,
        total=sum(persistent.values()) + temporary + reserve,
    )


def _loss_block(sizes: Architecture, batch: MicroBatchSize) -> int:
    """Bytes of a chunk's logits in float32."""
    return min(LOSS_CHUNK, batch.labelled) * sizes.vocabulary * 4


def _reserve(machine: Machine, batch: MicroBatchSize, temporary: int, in_heap: int) -> int:
    """Bytes of the process in addition to its tensors. `in_heap`: bytes of the temporary memory in a CPU's heap."""
    if machine.kind == "gpu":
        return PROCESS_BYTES["gpu"] + int(GPU_FRAGMENTATION * temporary)
    full = min(1.0, batch.updates / KERNELS_FULL_AFTER)
    kernels = full * KERNEL_BYTES
    holes = HOLES[0] + full * (HOLES[1] - HOLES[0])
    return PROCESS_BYTES["cpu"] + int(kernels + holes * (in_heap + kernels) + full * MAX_HOLES)


def _weights(sizes: Architecture, spec: TrainSpec, packed: Quantization | None, machine: Machine, stored: int) -> int:
    """Bytes of the base in the process's own memory.

    On a CPU, tensors in the stored number format stay in the mapped file: embeddings, head and norms beside quantised
    layers, and the whole of an unquantised base.
    """
    if machine.kind == "gpu" or round(stored / sizes.parameters) != machine.compute:
        return _loaded_weights(sizes, packed, machine.compute)
    if spec.quantization is None:
        return sizes.parameters * machine.compute if spec.adapter is None else 0
    return _loaded_weights(sizes, packed, machine.compute) - sizes.other_parameters * machine.compute


def _loaded_weights(sizes: Architecture, packed: Quantization | None, compute: int) -> int:
    """Bytes of the base's weights.

    4 bits (QLoRA, arXiv:2305.14314): each block of 64 weights has a scale, a float32. With double quantisation the
    scale is a byte, and 256 scales share a float32. 8 bits (LLM.int8(), arXiv:2208.07339): a float32 for each row.
    """
    linear, others = sizes.linear_parameters, sizes.other_parameters * compute
    if packed is None:
        return linear * compute + others
    if packed.bits == 8:
        rows = sizes.layers * sum(outputs for _, outputs in sizes.linears.values())
        return linear + rows * 4 + others
    blocks = linear // 64
    return linear // 2 + (blocks + blocks // 64 if packed.double_quant else blocks * 4) + others


def _dequantization_buffers(sizes: Architecture, packed: Quantization | None, compute: int) -> int:
    """Bytes to dequantise the largest linear layer: its weight in the compute format, its scales in float32."""
    if packed is None:
        return 0
    largest = max(inputs * outputs for inputs, outputs in sizes.linears.values())
    return largest * compute + largest // 16


def _dora_buffers(sizes: Architecture, spec: TrainSpec, compute: int) -> int:
    """Bytes of DoRA (arXiv:2402.09353): it merges base and adapter for the weight's norm and for its gradient."""
    if not (isinstance(spec.adapter, LoraAdapter) and spec.adapter.use_dora):
        return 0
    largest = max(inputs * outputs for inputs, outputs in sizes.linears.values())
    return largest * (8 + 4 * compute)


def _layer(sizes: Architecture, spec: TrainSpec, batch: MicroBatchSize, compute: int) -> int:
    """Bytes per token that one layer saves. Transformers' own forward also has an attention mask over all tokens."""
    if uses_llama_forward(sizes, spec):
        return count_llama_forward_bytes(sizes, spec, compute)
    return count_transformers_bytes(sizes, spec, compute) + compute * batch.tokens


def _saved_activations(sizes: Architecture, layer: int, batch: MicroBatchSize, compute: int, *, recompute: bool) -> int:
    """Bytes that the forward pass saves: every layer's activations, or with `recompute` only every layer's input.

    Also the last norm's float32 input, the hidden states, and for positions with a loss a copy and its gradient.
    """
    width = compute * sizes.hidden
    layers = sizes.layers * (width if recompute else layer)
    return batch.tokens * (layers + 4 * sizes.hidden + width) + batch.labelled * 2 * width


def _backward_working_memory(sizes: Architecture, spec: TrainSpec, batch: MicroBatchSize, machine: Machine) -> int:
    """Bytes of working memory of a layer's backward pass.

    The MLP and the attention run one after the other, so the larger one counts. Gradients of the projections to the
    LoRA rank and of the layer's parameters are added."""
    hidden, queries, keys, inner = sizes.hidden, sizes.query_width, sizes.key_width, sizes.intermediate
    gated = batch.tokens * (machine.compute * 3 * (inner + hidden) + 12 * hidden)
    streams = batch.tokens * machine.compute * (2 * hidden + queries + 3 * (queries + 2 * keys))
    ranks = batch.tokens * machine.compute * 2 * get_rank(spec) * len(sizes.linears)
    parameters = count_trainable_parameters(sizes, spec) // sizes.layers * machine.compute
    return max(gated, streams + _scores(sizes, batch, machine)) + ranks + parameters


def _scores(sizes: Architecture, batch: MicroBatchSize, machine: Machine) -> int:
    """Bytes of one row's attention. A fused kernel has no scores, but gradients of each head's keys and values."""
    fused = batch.longest * machine.compute * 5 * sizes.query_width
    if machine.kind == "gpu":
        return fused
    row = min(batch.longest, PLAIN_ATTENTION_UP_TO)
    rounded = machine.compute if machine.compute < 4 else 0
    sums = (
        row * 4 * 2 * (sizes.query_width + sizes.key_width)
    )  # the row's gradients, in float32, and its queries once more
    return max(fused, sizes.heads * query_block(row) * row * (12 + rounded) + sums)


def query_block(row: int) -> int:
    """How many queries of a row of `row` tokens are one block: equal blocks of about QUERY_BLOCK."""
    return math.ceil(row / max(1, round(row / QUERY_BLOCK)))


def _positions_and_masks(sizes: Architecture, batch: MicroBatchSize, machine: Machine) -> int:
    """Bytes of token ids, rotary angles (RoPE) and attention masks, which stay for the whole micro-batch.

    On a CPU a mask is in float32, once for each query head of a group. It covers each block of queries over the keys of
    the same block, and a branch's queries over the keys of the whole row.
    """
    angles = batch.tokens * (2 * sizes.head_dim * machine.compute + 4 * 8)
    if machine.kind == "gpu":
        return angles + batch.tokens * batch.longest
    row = min(batch.longest, PLAIN_ATTENTION_UP_TO)
    return angles + (batch.tokens + row) * query_block(row) * 4 * (sizes.heads // sizes.kv_heads)


def _logits(sizes: Architecture, batch: MicroBatchSize, compute: int) -> int:
    """Bytes of a chunk's logits, in the compute format and in float32, of log-probabilities and of both gradients.

    Also the gradients of the chunk's hidden states, for the chunk and for all positions."""
    return min(LOSS_CHUNK, batch.labelled) * (sizes.vocabulary * (12 + compute) + 2 * sizes.hidden * compute)
