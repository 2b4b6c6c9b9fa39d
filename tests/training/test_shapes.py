"""The memory model against the recipe's own update at the sizes of a 7B model: on the meta device, without weights."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig

from app.domain.architectures import PUBLISHED_ARCHITECTURES, Architecture
from app.domain.memory import GPU16, PROCESS_BYTES, Machine, MicroBatchSize, estimate_memory
from app.domain.specs import TrainSpec
from app.domain.trainables import count_trainable_parameters
from benchmarks.live import LiveBytes
from benchmarks.shape_only import Seen, rows_of, run_update
from worker.precision import FP32
from worker.training import loss, model
from worker.training.master_weights import MasterWeights

SEVEN = PUBLISHED_ARCHITECTURES["Llama-2-7B"]
SLACK = 0.05
"""Of what comes and goes: what the figures may be above tensors that are only counted."""
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = {"lora_alpha": 32, "target_modules": "all-linear", **TASK}
ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "lora": ({"type": "lora", "r": 16}, lambda: LoraConfig(r=16, **LORA)),
    "dropout": ({"type": "lora", "r": 16, "dropout": 0.05}, lambda: LoraConfig(r=16, lora_dropout=0.05, **LORA)),
    "dora": ({"type": "lora", "r": 16, "use_dora": True}, lambda: LoraConfig(r=16, use_dora=True, **LORA)),
    "adalora": ({"type": "adalora"}, lambda: AdaLoraConfig(init_r=12, target_r=8, total_step=100, **LORA)),
    "ia3": ({"type": "ia3"}, lambda: IA3Config(**TASK)),
}


def share(
    sizes: Architecture, adapter: str, seen: Seen, load: MicroBatchSize, *, recompute: bool, packed: bool
) -> float:
    """The planned bytes over the measured ones, both without those of a process before its first tensor."""
    asked = {"dataset": "d", "adapter": ADAPTERS[adapter][0], "quantization": {"bits": 4} if packed else None}
    spec = TrainSpec.model_validate(asked)
    taken = estimate_memory(sizes, spec, load, GPU16, recompute=recompute, stored=1 << 40)
    return (taken.total - PROCESS_BYTES["gpu"]) / seen.peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "adapter", "packed"),
    [
        ("Llama-2-7B", "lora", True),
        ("Llama-2-7B", "lora", False),
        ("Qwen2.5-7B", "lora", True),
        ("SmolLM2-135M", "lora", True),
        ("SmolLM2-135M", "dropout", True),
        ("SmolLM2-135M", "dora", True),
        ("SmolLM2-135M", "adalora", True),
        ("SmolLM2-135M", "ia3", False),
    ],
)
def test_the_model_is_never_below_the_recipe_and_at_most_a_quarter_above(
    name: str, adapter: str, packed: bool, recompute: bool
) -> None:
    batch, sizes = rows_of(2048, 512, 0.33), PUBLISHED_ARCHITECTURES[name]
    seen = run_update(sizes, ADAPTERS[adapter][1](), batch, recompute=recompute, packed=packed, stock=adapter != "lora")
    load = MicroBatchSize(batch.tokens, 512, batch.labelled)
    assert 1.0 <= share(sizes, adapter, seen, load, recompute=recompute, packed=packed) <= 1.25


def test_a_token_of_a_7b_model_keeps_at_most_seven_and_a_half_megabytes() -> None:
    batch = rows_of(512, 256, 0.33)
    seen = run_update(SEVEN, ADAPTERS["lora"][1](), batch, recompute=False, packed=True, stock=False)
    assert seen.kept / batch.tokens < 7.5e6


@pytest.mark.parametrize("drawn", range(24))
def test_tensors_that_live_on_a_cpu_are_those_of_the_model(tiny_base: Path, drawn: int) -> None:
    """The tiny model really trained, at settings that the test draws."""
    draw = random.Random(drawn)
    length, rows, rank, recompute = draw.choice([64, 128, 400]), draw.randint(1, 8), draw.choice([2, 4, 8]), drawn % 2
    adapter, batch = {"type": "lora", "r": rank}, rows_of(rows * length, length, draw.choice([0.1, 0.9]))
    asked = {"dataset": "d", "adapter": adapter, "trainer": {"enable_gradient_checkpointing": bool(recompute)}}
    spec = TrainSpec.model_validate(asked)
    trainable = model.load_trainable_model(tiny_base, spec, 1, FP32, torch.device("cpu"), lambda _: None)
    masters = MasterWeights(trainable.method.parameters(), torch.float32)
    with LiveBytes() as live:
        states = trainable.hidden(batch)
        loss.backward_loss(states, trainable.head, batch, 1.0)
    sizes = Architecture.from_config(json.loads((tiny_base / "config.json").read_text()))
    assert sizes is not None
    assert count_trainable_parameters(sizes, spec) == masters.count
    load = MicroBatchSize(batch.tokens, length, batch.labelled)
    taken = estimate_memory(sizes, spec, load, Machine("cpu", 4), recompute=bool(recompute), stored=1 << 20)
    standing = taken.weights + taken.mapped_files + taken.adapter + taken.gradients + taken.optimizer
    moving = (taken.total - standing - taken.reserve) * (1 + SLACK)  # these bytes come in no heap
    assert 1.0 <= (standing + moving) / (standing + max(live.peak, taken.checkpoint)) <= 1.25
