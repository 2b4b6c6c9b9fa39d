"""Plans: what a job takes of a device, whether it fits, and what would make it fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services
from app.domain.devices import DeviceDescription
from app.domain.errors import InvalidError
from app.domain.ledger import Policy
from app.domain.memory import PROCESS_BYTES
from app.domain.plans import Plan
from app.domain.remedies import apply_change, merge_changes
from app.domain.specs import TrainSpec
from app.services.plans import CHECKPOINTING_FROM
from tests.conftest import trajectory_text

TRAINER = DeviceDescription(type="cpu", model="a cpu", bytes=1 << 40, cores=2, queues=("gpu",))
ROOM = PROCESS_BYTES["cpu"]


@pytest.fixture
def dataset(services: Services, upload: Path) -> str:
    return services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id


def has(services: Services, size: int, **device: Any) -> None:
    """The deployment's trainer has `size` bytes for a model, beside what a process takes for itself."""
    described = {"bytes": size + PROCESS_BYTES[device.get("type", "cpu")], **device}
    services.devices.report("trainer", TRAINER.model_copy(update=described))


def moved(plan: Plan) -> int:
    assert plan.memory is not None
    return plan.memory.total - ROOM


def test_without_a_device_nothing_is_planned_and_nothing_refused(services: Services, dataset: str) -> None:
    plan = services.jobs.plan({"dataset": dataset})
    assert (plan.device, plan.fits, plan.memory, plan.seconds) == ("unknown", None, None, None)
    assert plan.trainable_parameters == 16 * 2 * (2 * 128 + 2 * 96 + 2 * 192 + 192)
    services.jobs.submit({"dataset": dataset})


@pytest.mark.parametrize(
    ("adapter", "place", "words", "way_out"),
    [
        ({"type": "lora", "target_modules": ["q_proj", "v_prj"]}, ("target_modules", 1), "'v_prj'", "'v_proj'"),
        (
            {"type": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["x"]},
            ("target_modules", 0),
            "'x'",
            "q_proj",
        ),
        ({"type": "lora", "r": 65}, ("r",), "65 is more than k_proj has", "at most 32"),
        ({"type": "lora", "r": 65, "target_modules": ["q_proj"]}, ("r",), "more than q_proj has", "at most 64"),
        ({"type": "adalora", "init_r": 65, "target_r": 2}, ("init_r",), "65 is more than k_proj has", "at most 32"),
    ],
)
def test_layers_and_ranks_that_the_base_does_not_have_are_refused_at_once(
    services: Services, dataset: str, adapter: dict[str, Any], place: tuple[str | int, ...], words: str, way_out: str
) -> None:
    with pytest.raises(InvalidError) as refused:
        services.jobs.submit({"dataset": dataset, "adapter": adapter})
    (problem,) = refused.value.problems
    assert problem.loc == ("adapter", *place)
    assert words in problem.message
    assert way_out in (problem.hint or "")


@pytest.mark.parametrize("names", [["lm_head"], ["layers.0.self_attn.q_proj"], ["self_attn.v_proj", "down_proj"]])
def test_layers_may_be_named_in_any_way_that_finds_them(services: Services, dataset: str, names: list[str]) -> None:
    services.jobs.submit({"dataset": dataset, "adapter": {"type": "lora", "r": 4, "target_modules": names}})


def test_the_trainers_device_memory_is_the_limit(services: Services, dataset: str) -> None:
    has(services, 1 << 30)
    plan = services.jobs.plan({"dataset": dataset})
    assert (plan.device, plan.device_bytes, plan.fits) == ("trainer", (1 << 30) + ROOM, True)
    assert plan.remedies == ()


def test_a_card_can_be_asked_about(services: Services, dataset: str) -> None:
    plan = services.jobs.plan({"dataset": dataset}, "t4")
    assert (plan.device, plan.device_bytes, plan.fits) == ("t4", int(14.5 * 2**30), True)
    assert plan.tokens_per_micro_batch == 4_096
    with pytest.raises(InvalidError, match="known here: a10, a100-40, h100, l4, t4") as refused:
        services.jobs.plan({"dataset": dataset}, "t40")
    assert refused.value.code == "unknown_device"


def test_a_job_that_is_too_large_is_refused_and_any_remedy_lets_it_in(services: Services, dataset: str) -> None:
    """The device has room for all but the last hundred bytes."""
    has(services, 1 << 40)
    spec: dict[str, Any] = {
        "dataset": dataset,
        "quantization": None,
        "trainer": {"batch_size": 4, "gradient_accumulation_steps": 2, "enable_gradient_checkpointing": False},
    }
    has(services, moved(services.jobs.plan(spec)) - 100)
    plan = services.jobs.plan(spec)
    assert plan.fits is False
    with pytest.raises(InvalidError) as refused:
        services.jobs.submit(spec)
    assert refused.value.code == "does_not_fit"
    assert services.jobs.list_jobs(None, 10, None) == ([], False)
    assert len(refused.value.problems) == len(plan.remedies)
    assert [next(iter(remedy.change)) for remedy in plan.remedies] == ["trainer", "trainer"]
    assert plan.remedies[1].change == {"trainer": {"batch_size": 2, "gradient_accumulation_steps": 4}}
    for remedy in plan.remedies:
        better = services.jobs.submit(apply_change(TrainSpec.model_validate(spec), remedy.change).model_dump())
        assert isinstance(better.plan, Plan)
        assert isinstance(better.spec, TrainSpec)
        assert better.plan.fits
        assert better.plan.memory is not None
        assert better.plan.memory.total == remedy.bytes
        assert better.spec.trainer.effective_rows == 8


def test_rows_that_can_be_trimmed_may_be_shorter_instead(services: Services, tmp_path: Path) -> None:
    seen = " ".join(f"The river passes through town number {number}." for number in range(30))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"claim": "It is long.", "trajectories": trajectory_text("SUPPORTS", "Rhine", seen)}))
    services.datasets.create(path, path.name, None, "long", {})
    has(services, 1 << 40)
    trainer = {"batch_size": 1, "enable_gradient_checkpointing": True, "verdict_branch": 0}
    spec = {"dataset": "long", "trainer": trainer}
    whole = services.jobs.plan(spec)
    has(services, moved(whole) - 100)
    (remedy,) = services.jobs.plan(spec).remedies
    assert remedy.change == {"preprocessing": {"global_max_sequence_length": int(0.75 * whole.lengths.maximum)}}
    assert services.jobs.plan(spec | remedy.change).rows_trimmed == 1


def test_where_one_change_is_not_enough_several_are_named_together(services: Services, dataset: str) -> None:
    has(services, 1 << 40)
    least = {"trainer": {"batch_size": 1, "enable_gradient_checkpointing": True}}
    has(services, moved(services.jobs.plan({"dataset": dataset, **least})) + 100)
    spec = {"dataset": dataset, "trainer": {"batch_size": 4, "enable_gradient_checkpointing": False}}
    (remedy,) = services.jobs.plan(spec).remedies
    assert remedy.change == least


def test_the_policy_follows_from_the_bytes_of_both_tenants(services: Services, dataset: str) -> None:
    assert services.jobs.plan({"dataset": dataset}).policy is None
    has(services, 1 << 40)
    roomy = services.jobs.plan({"dataset": dataset})
    assert roomy.policy is Policy.SHARE
    assert roomy.memory is not None
    needed = roomy.memory.total
    services.devices.report("trainer", TRAINER.model_copy(update={"bytes": needed + 1_000}))
    assert services.jobs.plan({"dataset": dataset}).policy is Policy.YIELD
    services.ledger.reserve_for_inference("trainer", "server", 1_000)
    assert services.jobs.plan({"dataset": dataset}).policy is Policy.SHARE
    services.ledger.reserve_for_inference("trainer", "server", 1_001)
    assert services.jobs.plan({"dataset": dataset}).policy is Policy.YIELD
    assert services.jobs.plan({"dataset": dataset}, "t4").policy is Policy.SHARE


def test_a_plan_says_if_no_remedy_helps(services: Services, dataset: str) -> None:
    services.devices.report("trainer", TRAINER.model_copy(update={"bytes": 1 << 20}))
    with pytest.raises(InvalidError, match="nothing that could be changed") as refused:
        services.jobs.submit({"dataset": dataset})
    assert refused.value.problems == ()


def test_auto_recomputes_only_if_memory_requires_it(services: Services, dataset: str) -> None:
    has(services, 1 << 40)
    spec = {"dataset": dataset, "trainer": {"batch_size": 4}}
    roomy = services.plans.prepare(spec)
    has(services, moved(roomy.plan) - 100)
    tight = services.plans.prepare(spec)
    assert (roomy.plan.gradient_checkpointing, tight.plan.gradient_checkpointing) == (False, True)
    assert tight.plan.fits
    assert [p.ordered.trainer.enable_gradient_checkpointing for p in (roomy, tight)] == [False, True]
    assert tight.spec.trainer.enable_gradient_checkpointing == "auto"


def test_only_a_cpus_plan_limits_the_childs_own_memory(services: Services, dataset: str) -> None:
    spec = {"dataset": dataset}
    assert services.plans.prepare(spec).resident_limit == 0
    has(services, 1 << 40)
    planned = services.plans.prepare(spec)
    assert planned.plan.memory is not None
    assert planned.resident_limit == planned.plan.memory.total - planned.plan.memory.logits > ROOM
    has(services, 1 << 40, type="gpu")
    assert services.plans.prepare(spec).resident_limit == 0


def test_a_job_that_runs_is_planned_for_the_worker_that_has_it(services: Services, dataset: str) -> None:
    has(services, 1 << 40)
    services.devices.report("another", TRAINER.model_copy(update={"bytes": 1 << 20}))
    asked = {"dataset": dataset}
    assert services.plans.prepare(asked, worker="another").plan.device == "another"
    assert services.plans.prepare(asked, worker="unheard of").plan.device in ("another", "trainer")


def test_a_wider_format_takes_more(services: Services, dataset: str) -> None:
    has(services, 1 << 40, bfloat16=True)
    narrow = moved(services.jobs.plan({"dataset": dataset}))
    has(services, 1 << 40)
    assert moved(services.jobs.plan({"dataset": dataset})) > narrow


def test_time_follows_from_the_pace_of_the_last_job_over_this_base(services: Services, dataset: str) -> None:
    has(services, 1 << 40)
    base = services.base_models.get(None)
    asked = TrainSpec.model_validate({"dataset": dataset, "trainer": {"epochs": 2}})
    served = services.base_models.served_digest(base, asked.quantization)
    services.devices.measured("trainer", served, 50.0)
    has(services, 1 << 40)  # the next report keeps it
    plan = services.jobs.plan(asked.model_dump())
    assert plan.seconds == pytest.approx(2 * plan.tokens_per_epoch / 50, abs=0.1)
    assert services.jobs.plan({"dataset": dataset, "quantization": None}).seconds is None
    services.devices.measured("nowhere", served, 50.0)
    assert [device.name for device in services.devices.list_devices()] == ["trainer"]


def test_sizes_missing_from_config_json_are_no_reason_to_refuse(
    services: Services, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.base_models, "sizes", lambda row: None)
    has(services, 1 << 20, type="gpu", capability=(7, 5))
    plan = services.jobs.plan({"dataset": dataset})
    assert (plan.memory, plan.fits, plan.trainable_parameters) == (None, None, None)
    assert not plan.gradient_checkpointing
    assert services.base_models.describe(services.base_models.get(None)).parameters < CHECKPOINTING_FROM


def test_changes_add_up_within_a_section() -> None:
    assert merge_changes({"trainer": {"a": 1}, "b": 2}, {"trainer": {"c": 3}}) == {"trainer": {"a": 1, "c": 3}, "b": 2}


def test_rows_without_steps_are_warned_about(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    rows = [{"claim": f"It is {n}.", "label": label} for n, label in enumerate(("SUPPORTS", "REFUTES"))]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    services.datasets.create(path, path.name, None, "claims", {}, "claims")
    (warning,) = services.jobs.plan({"dataset": "claims"}).warnings
    assert "2 rows of the dataset have no Search" in warning


def test_a_dataset_of_one_verdict_is_warned_about(services: Services, dataset: str, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    rows = [{"claim": f"It is {n}.", "trajectories": trajectory_text("REFUTES", "Rhine", "It is.")} for n in range(3)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    services.datasets.create(path, path.name, None, "one", {})
    (warning,) = services.jobs.plan({"dataset": "one"}).warnings
    assert "every row of the dataset ends in REFUTES" in warning
    assert services.jobs.plan({"dataset": dataset}).warnings == ()
