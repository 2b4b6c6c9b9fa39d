"""Profiles one update of Veritune with torch.profiler, after a warm-up update.

    python -m benchmarks.profiling ORDER.json [packed]

Also times loading the base with and without quantising it, imports being done. Tells one JSON line.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from app.domain import memory
from app.domain.attempts import TrainOrder
from worker.precision import precision_here
from worker.training import model as training_model
from worker.training.batches import MicroBatch, batches_of_update, read_rows
from worker.training.state import RunState
from worker.training.updates import backward, gradient_norm, optimizer_step

PARTS = {
    "matrix products": ("mm", "addmm", "addmm_", "linear", "mkldnn_linear", "_linear_pointwise"),
    "attention": (
        "bmm",
        "baddbmm",
        "_softmax",
        "_softmax_backward_data",
        "masked_fill_",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "NF4 dequantisation": ("dequantize_4bit", "dequantize_blockwise"),
    "loss": ("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"),
    "optimizer": ("_fused_adamw_", "_foreach_addcdiv_", "lerp_", "addcdiv_", "linalg_vector_norm"),
    "copies and casts": ("copy_", "cat", "index_select", "index_select_backward", "index_add_", "contiguous"),
}
"""Parts by the operators whose own time they are; what is in none is element-wise work."""


def part_of(operator: str) -> str:
    name = operator.rpartition("::")[2]
    for part, names in PARTS.items():
        if name in names:
            return part
    return "element-wise"


class Update:
    """The training recipe's update, repeatable."""

    def __init__(self, order: TrainOrder) -> None:
        device = torch.device("cpu")
        precision = precision_here(device, order.base.fp16)
        torch.manual_seed(order.spec.seed)
        self.trainable = training_model.load_trainable_model(
            order.base.path, order.spec, order.schedule.updates, precision, device, lambda _: None
        )
        self._order, self._rows = order, read_rows(order.rows, self.trainable.vocab_size)
        self.state = RunState(order, self.trainable, self._rows, precision, device)

    def batches(self, update: int) -> list[MicroBatch]:
        return batches_of_update(self._rows, update, self._order.schedule, self._order.spec.seed)

    def run(self, batches: list[MicroBatch]) -> None:
        backward(self.trainable, self.state, batches)
        optimizer_step(self.state, 1e-4, gradient_norm(self.state), 1.0)
        self.state.masters.reset()


def profiled(order: TrainOrder) -> dict[str, Any]:
    update = Update(order)
    batches = update.batches(1)
    update.run(batches)
    began = time.perf_counter()
    update.run(batches)
    plain = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        update.run(batches)
        whole = time.perf_counter() - began
    return {
        "tokens": sum(batch.tokens for batch in batches),
        "seconds_unprofiled": round(plain, 3),
        "seconds_profiled": round(whole, 3),
        "shares": _shares(seen.key_averages(), whole),
        "operators": _largest(seen.key_averages()),
    }


def _shares(events: Any, seconds: float) -> dict[str, float]:
    """Shares of the profiled seconds; `Python and waiting` is what no operator accounts for."""
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e6
    parts["Python and waiting"] = seconds - sum(parts.values())
    return {name: round(value / seconds, 4) for name, value in sorted(parts.items(), key=lambda item: -item[1])}


def _largest(events: Any, count: int = 15) -> list[dict[str, Any]]:
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)[:count]
    return [{"name": e.key, "calls": e.count, "seconds": round(e.self_cpu_time_total / 1e6, 4)} for e in ranked]


def loading(order: TrainOrder) -> dict[str, float]:
    """Seconds of loading the base as it is stored, and of what the training child does instead."""
    automatic: Any = AutoModelForCausalLM
    began = time.perf_counter()
    automatic.from_pretrained(order.base.path, dtype="auto")
    plain = time.perf_counter() - began
    precision = precision_here(torch.device("cpu"), order.base.fp16)
    began = time.perf_counter()
    training_model._load_base(order.base.path, order.spec.quantization, precision, torch.device("cpu"))
    return {"load": round(plain, 3), "load_and_quantise": round(time.perf_counter() - began, 3)}


def main(order: TrainOrder, packed: bool) -> None:
    torch.set_num_threads(int(os.environ.get("VERITUNE_THREADS", "2")))
    if packed:
        memory.KEEP_DEQUANTIZED_UP_TO = 0
    print(json.dumps({"loading": loading(order), **profiled(order)}), flush=True)


if __name__ == "__main__":
    main(TrainOrder.model_validate_json(Path(sys.argv[1]).read_bytes()), "packed" in sys.argv[2:])
