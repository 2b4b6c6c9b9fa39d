"""The recipe run in this process: the adapter it makes, and the ways it ends."""

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.domain.attempts import TrainOrder
from tests.tiny import make_tiny_model, without_pad
from tests.training.conftest import OrderFactory, make_rows
from worker.precision import BF16, FP16, Precision
from worker.training import recipe
from worker.training.channel import Channel
from worker.training.checkpoints import read_checkpoint, write_checkpoint
from worker.training.errors import TrainingError


def run(order: TrainOrder) -> list[dict[str, Any]]:
    """The events of a run. Raises what the recipe raises."""
    out = io.BytesIO()
    recipe.train(order, Channel(out, io.BytesIO()))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def metrics(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "metrics"]


def test_the_adapter_is_learned_portable_and_loads_in_stock_peft(make_order: OrderFactory, tiny_base: Path) -> None:
    order = make_order({"quantization": None}, updates=5)
    run(order)
    adapter = order.directory / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny@r1"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tiny_base.parent) not in (adapter / "adapter_config.json").read_text()

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad(), warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, adapter)(ids).logits
    expected = merged_logits(tiny_base, weights, config["lora_alpha"] / config["r"], ids)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert (after - before).abs().max() > 0.1


def merged_logits(base: Path, weights: dict[str, torch.Tensor], scale: float, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the base with each product B·A added to its layer's weight: LoRA by its definition."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, low in weights.items():
        if name.endswith("lora_A.weight"):
            high = weights[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(layer).get_parameter("weight").data += scale * high @ low
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("precision", [BF16, FP16])
def test_narrow_formats_learn_too_and_keep_masters_in_float32(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(recipe, "precision_here", lambda *_: precision)
    order = make_order(updates=8)
    events = run(order)
    assert metrics(events)[-1]["loss"] < 0.8 * metrics(events)[0]["loss"]
    assert metrics(events)[0]["grad_norm"] < 100  # the loss scale of float16 is out of it again
    weights = load_file(order.directory / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(value, value.to(precision.compute).float()) for value in weights.values())


def test_a_float16_overflow_is_skipped_and_the_scale_comes_down(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "precision_here", lambda *_: FP16)
    monkeypatch.setattr("worker.training.state.INITIAL_SCALE", 2.0**20)
    events = run(make_order({"trainer": {"learning_rate_scheduler": {"warmup_fraction": 0.9}}}, updates=16))
    seen = metrics(events)
    skipped = [m["skipped"] for m in seen]
    logs = [event for event in events if event["event"] == "log" and "is skipped" in event["message"]]
    assert [log["data"]["update"] for log in logs] == [m["update"] for m in seen if m["skipped"]]
    scales = [log["data"]["loss_scale"] for log in logs]
    assert scales == [2.0**19 / 2**step for step in range(len(logs))]
    assert skipped[0]
    assert not skipped[-1]
    rates = [m["learning_rate"] for m in seen]
    assert rates[1] == rates[0], "a skipped update holds the schedule"
    assert rates[-1] > rates[0]


def test_losses_that_are_not_finite_are_reported_and_fail_the_job(make_order: OrderFactory, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    out = io.BytesIO()
    with pytest.raises(TrainingError) as refused:
        recipe.train(make_order(base=base, updates=20), Channel(out, io.BytesIO()))
    assert refused.value.code == "not_finite"
    seen = metrics([json.loads(line) for line in out.getvalue().splitlines()])
    assert [(m["loss"], m["skipped"]) for m in seen] == [(None, True)] * 5
    assert b"update 5 is skipped: its loss is not finite" in out.getvalue()


def test_a_checkpoint_of_other_work_is_refused(make_order: OrderFactory) -> None:
    events = run(make_order(updates=4, every=4, name="one"))
    path = Path(next(event for event in events if event["event"] == "checkpoint")["path"])
    with pytest.raises(TrainingError) as refused:
        run(make_order({"seed": 1}, updates=4, every=4, name="other", resume_from=path))
    assert refused.value.code == "checkpoint_mismatch"


def test_a_checkpoint_whose_state_is_laid_out_otherwise_is_refused(make_order: OrderFactory, tmp_path: Path) -> None:
    events = run(make_order(updates=4, every=2, name="one"))
    path = Path(next(event for event in events if event["event"] == "checkpoint")["path"])
    saved = read_checkpoint(path)
    shorter = {key: moment[:-8] if moment.ndim else moment for key, moment in saved.optimizer.items()}
    older, _ = write_checkpoint(tmp_path / "older", replace(saved, optimizer=shorter))
    with pytest.raises(TrainingError, match="written by another version") as refused:
        run(make_order(updates=4, every=2, name="other", resume_from=older))
    assert refused.value.code == "checkpoint_mismatch"


def test_a_job_whose_last_checkpoint_is_its_last_update_only_writes_the_adapter(make_order: OrderFactory) -> None:
    first = make_order(updates=4, every=4, name="one")
    events = run(first)
    path = Path(next(event for event in events if event["event"] == "checkpoint")["path"])
    again = make_order(updates=4, every=4, name="again", resume_from=path)
    resumed = run(again)
    assert metrics(resumed) == []
    assert resumed[-1]["metrics"]["loss"] == events[-1]["metrics"]["loss"]
    written = [o.directory / "adapter" / "adapter_model.safetensors" for o in (first, again)]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_without_any_sound_checkpoint_it_starts_from_the_beginning(make_order: OrderFactory, tmp_path: Path) -> None:
    events = run(make_order(updates=2, resume_from=tmp_path / "update-000007"))
    assert next(event for event in events if event["event"] == "started")["resumed_from_update"] == 0
    assert [event["level"] for event in events if event["event"] == "log"].count("warning") == 2


def test_one_row_is_enough(make_order: OrderFactory) -> None:
    assert run(make_order(rows=make_rows(1), updates=2))[-1]["outcome"] == "succeeded"


def test_a_base_without_a_pad_token_trains_as_one_with_it(make_order: OrderFactory, tmp_path: Path) -> None:
    """Rows are packed, not padded."""
    base = make_tiny_model(tmp_path / "base")
    without_pad(base)
    orders = [make_order(updates=2, name="with"), make_order(updates=2, name="without", base=base)]
    for order in orders:
        run(order)
    written = [order.directory / "adapter" / "adapter_model.safetensors" for order in orders]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_the_same_order_gives_the_same_adapter_and_another_seed_another_one(make_order: OrderFactory) -> None:
    written = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        order = make_order({"seed": seed}, updates=2, name=name)
        run(order)
        written.append((order.directory / "adapter" / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]
