"""The plan's memory against recorded peaks of real jobs: no model is needed to compute the ratio.

`measured_memory.json` has the base's sizes and each job's spec, rows and `peak_memory_bytes`. `docs/plan.md` says how
they were measured.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.architectures import Architecture
from app.domain.memory import Machine, MemoryEstimate, estimate_memory
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec

RECORDED = json.loads(Path(__file__).with_name("measured_memory.json").read_text(encoding="utf-8"))
BASES: dict[str, Any] = RECORDED["bases"]
JOBS: list[dict[str, Any]] = RECORDED["jobs"]


def planned(job: dict[str, Any], **change: Any) -> MemoryEstimate:
    """What the plan of this job says, on the machine that measured it."""
    base = BASES[job["base"]]
    spec = TrainSpec.model_validate({"dataset": "d", **job["spec"]})
    schedule = Schedule.for_spec(spec, job["rows"], job["longest"], "cpu")
    batch = schedule.get_largest_micro_batch(job["longest"], job["labelled_share"])
    sizes = Architecture.from_config(base["config"] | change)
    assert sizes is not None
    recompute = spec.trainer.enable_gradient_checkpointing is True
    machine = Machine("cpu", job["compute"])
    return estimate_memory(sizes, spec, batch, machine, recompute=recompute, stored=base["bytes"])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["name"])
def test_the_plan_is_between_the_measured_peak_and_a_quarter_above(job: dict[str, Any]) -> None:
    assert 1.0 <= planned(job).total / job["peak_memory_bytes"] <= 1.25


def test_three_families_of_different_vocabularies_were_measured() -> None:
    assert {base["config"]["model_type"] for base in BASES.values()} == {"llama", "qwen2", "gemma3_text"}
    assert {job["base"] for job in JOBS} == set(BASES)
    assert len({base["config"]["vocab_size"] for base in BASES.values()}) == 3


def test_mapped_files_and_dequantised_weights_are_told_apart() -> None:
    """A small base is dequantised: its linear layers are in memory, its embeddings stay in the mapped file."""
    small, large = (next(job for job in JOBS if job["base"] == name) for name in ("SmolLM2-135M", "Qwen2.5-Coder-0.5B"))
    dense, packed = planned(small), planned(large)
    assert dense.mapped_files == BASES["SmolLM2-135M"]["bytes"]
    assert dense.weights == 2 * 106_168_320
    assert dense.quantization_buffers == 0
    assert packed.mapped_files == BASES["Qwen2.5-Coder-0.5B"]["bytes"]
    assert packed.weights < BASES["Qwen2.5-Coder-0.5B"]["bytes"] / 4
    assert packed.quantization_buffers > 0


def test_a_wider_vocabulary_costs_its_logits_and_nothing_else() -> None:
    job = next(job for job in JOBS if job["base"] == "SmolLM2-135M")
    narrow, wide = planned(job), planned(job, vocab_size=98_304)
    assert wide.logits == pytest.approx(2 * narrow.logits, rel=0.02)
    assert wide.activations == narrow.activations
