"""Evaluation while training: its losses, the update that it chooses, and that it does not change the training."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from app.domain.attempts import EncodedRow, TrainOrder
from app.domain.splits import SPLIT_NAMES, SplitName
from tests.training.conftest import OrderFactory, make_rows, unpack
from tests.training.test_child import Start, adapter_bytes
from tests.training.test_recipe import metrics, run
from worker.precision import FP32
from worker.training.batches import collate, shifted_labels
from worker.training.evaluation import HeldOut
from worker.training.model import load_trainable_model

SPEC = {"quantization": None, "adapter": {"type": "lora", "r": 4, "dropout": 0.1}}
HASTY = {"learning_rate": 0.003, "learning_rate_scheduler": {"decay": "constant", "warmup_fraction": 0}}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERITUNE_THREADS", "1")


def split_rows(count: int = 12) -> list[EncodedRow]:
    """Rows: a third each for training, validation and test."""
    return [row.model_copy(update={"part": SPLIT_NAMES[row.line % 3]}) for row in make_rows(count)]


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def weighted_mean(found: list[dict[str, Any]], weights: dict[int, float]) -> float:
    total: float = sum(row["loss"] * weights[row["line"]] for row in found)
    return total / sum(weights[row["line"]] for row in found)


def row_losses(order: TrainOrder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (order.directory / "artifacts" / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("verdict_weight", [1.0, 20.0])
def test_evaluation_gives_the_loss_of_each_sequence_alone_without_dropout(
    make_order: OrderFactory, tiny_base: Path, verdict_weight: float
) -> None:
    order = make_order(SPEC | {"quantization": {"bits": 4}})
    trainable = load_trainable_model(tiny_base, order.spec, 30, FP32, torch.device("cpu"), lambda _: None)
    for parameter in trainable.method.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    rows, drawn = make_rows(7), torch.get_rng_state()
    found = HeldOut(rows, None, 60, verdict_weight).evaluate(trainable, torch.device("cpu"))
    assert found is not None
    assert torch.equal(torch.get_rng_state(), drawn)
    assert trainable.method.module.training
    assert all(module.training for module in trainable.method.module.modules())

    by_line = dict.fromkeys(range(1, 8), 0.0)
    right = labelled = 0
    total_weight = 0.0
    verdicts: list[bool] = []
    for module in trainable.method.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for row in unpack(rows):
        with torch.no_grad():
            logits = trainable.method.module(input_ids=torch.tensor([row.ids])).logits[0]
        labels = shifted_labels(row)
        places = torch.tensor([label.predictor for label in labels])
        targets = torch.tensor([label.target for label in labels])
        factors = torch.tensor([verdict_weight if place + 1 == row.verdict else 1.0 for place in places])
        by_line[row.line] += float(cross_entropy(logits[places], targets, reduction="none") @ factors)
        total_weight += float(factors.sum())
        right += int((logits[places].argmax(-1) == targets).sum())
        labelled += len(targets)
    for row in rows:
        if (own := row.branch) is not None and own.verdict is not None:
            with torch.no_grad():
                logits = trainable.method.module(input_ids=torch.tensor([row.ids[: own.at] + own.ids])).logits[0]
            verdicts.append(int(logits[own.at + own.verdict - 1].argmax()) == own.ids[own.verdict])
    assert found.verdict_accuracy == pytest.approx(sum(verdicts) / len(verdicts))
    assert dict(zip(found.lines, found.loss_sums, strict=True)) == pytest.approx(by_line, rel=1e-4)
    assert found.loss == pytest.approx(sum(by_line.values()) / total_weight, rel=1e-4)
    assert found.accuracy == pytest.approx(right / labelled)


def test_validation_rows_are_evaluated_each_epoch_and_test_rows_once(make_order: OrderFactory) -> None:
    order = make_order(SPEC, updates=5, rows=split_rows(18))  # six rows to train on: two updates an epoch
    events = run(order)
    validations = [event for event in of_kind(events, "evaluated") if event["part"] == SplitName.VALIDATION]
    assert [event["update"] for event in validations] == [2, 4, 5]
    measures = ("loss", "accuracy", "verdict_accuracy")
    seen = {m["update"]: tuple(m[f"validation_{name}"] for name in measures) for m in metrics(events)}
    evaluated = {event["update"]: tuple(event[name] for name in measures) for event in validations}
    assert seen == {1: (None,) * 3, 3: (None,) * 3} | evaluated
    assert all(0 < event["loss"] < 20 and 0 <= event["accuracy"] <= 1 and event["rows"] == 6 for event in validations)
    (test,) = [event for event in of_kind(events, "evaluated") if event["part"] == SplitName.TEST]
    assert test["rows"] == 6
    last = events[-1]["metrics"]
    assert (last["test_loss"], last["test_accuracy"]) == (test["loss"], test["accuracy"])


def test_held_out_rows_are_not_learned_and_evaluation_changes_nothing(make_order: OrderFactory) -> None:
    rows = split_rows()
    alone = make_order(SPEC, rows=[row for row in rows if row.part is SplitName.TRAIN], name="alone")
    watched = make_order(SPEC | {"trainer": {"steps_per_checkpoint": 1}}, rows=rows, name="watched")
    undisturbed, observed = metrics(run(alone)), metrics(run(watched))
    for measure in ("loss", "grad_norm", "tokens"):
        assert [m[measure] for m in observed] == [m[measure] for m in undisturbed]
    assert all(m["validation_loss"] for m in observed)


def test_the_best_state_is_published_and_lies_in_a_checkpoint(make_order: OrderFactory) -> None:
    order = make_order(SPEC | {"trainer": HASTY}, updates=20, rows=split_rows())
    events = run(order)
    validations = [event for event in of_kind(events, "evaluated") if event["part"] == SplitName.VALIDATION]
    best = min(validations, key=lambda event: event["loss"])
    assert best["update"] < 20, "this rate must overshoot, or nothing is tested"
    assert [e["update"] for e in validations if e["best"]][-1] == best["update"]
    last = events[-1]["metrics"]
    assert (last["best_update"], last["validation_loss"]) == (best["update"], best["loss"])
    kept = {event["update"]: event for event in of_kind(events, "checkpoint")}
    assert kept[best["update"]]["validation_loss"] == best["loss"]
    directory = Path(kept[best["update"]]["path"])
    for name, content in adapter_bytes(order).items():
        assert (directory / name).read_bytes() == content
    (test,) = [event for event in of_kind(events, "evaluated") if event["part"] == SplitName.TEST]
    assert test["update"] == best["update"]


@pytest.mark.parametrize(("patience", "ends"), [(2, "early"), (0, "late"), (-1, "late")])
def test_evaluations_without_improvement_end_the_training(make_order: OrderFactory, patience: int, ends: str) -> None:
    order = make_order(SPEC | {"trainer": HASTY | {"early_stop": patience}}, updates=30, rows=split_rows())
    events = run(order)
    validations = [event for event in of_kind(events, "evaluated") if event["part"] == SplitName.VALIDATION]
    stopped = any("stopped early" in event["message"] for event in of_kind(events, "log"))
    last = metrics(events)[-1]["update"]
    if ends == "late":
        assert (last, stopped) == (30, False)
        return
    assert stopped
    assert last < 30
    assert [event["best"] for event in validations[-2:]] == [False, False]
    assert not any(one["best"] is other["best"] is False for one, other in pairwise(validations[:-1]))
    assert events[-1]["metrics"]["best_update"] == [e["update"] for e in validations if e["best"]][-1]


def test_a_training_that_stopped_early_trains_no_further_when_it_is_resumed(make_order: OrderFactory) -> None:
    trainer = HASTY | {"early_stop": 2, "steps_per_checkpoint": 1}
    first = make_order(SPEC | {"trainer": trainer}, updates=30, rows=split_rows(), every=1, name="first")
    events = run(first)
    newest = Path(of_kind(events, "checkpoint")[-1]["path"])
    again = make_order(
        SPEC | {"trainer": trainer}, updates=30, rows=split_rows(), every=1, name="again", resume_from=newest
    )
    resumed = run(again)
    assert metrics(resumed) == []
    assert resumed[-1]["metrics"] | {"peak_memory_bytes": 0} == events[-1]["metrics"] | {"peak_memory_bytes": 0}
    assert adapter_bytes(again) == adapter_bytes(first)
    assert row_losses(again) == row_losses(first)


def test_a_run_resumed_after_its_best_update_ends_as_if_uninterrupted(make_order: OrderFactory) -> None:
    """From each of its checkpoints: before, at and after the best update."""
    spec = SPEC | {"trainer": HASTY}
    whole = make_order(spec, updates=12, rows=split_rows(), every=1, name="whole")
    events = run(whole)
    best = events[-1]["metrics"]["best_update"]
    assert 1 < best < 11
    for event in of_kind(events, "checkpoint"):
        if event["update"] in (1, best, 11):
            order = make_order(
                spec,
                updates=12,
                rows=split_rows(),
                every=1,
                name=f"from-{event['update']}",
                resume_from=Path(event["path"]),
            )
            run(order)
            assert adapter_bytes(order) == adapter_bytes(whole)
            assert row_losses(order) == row_losses(whole)


@pytest.mark.parametrize("verdict_weight", [1, 20])
def test_every_row_has_its_last_loss(make_order: OrderFactory, verdict_weight: int) -> None:
    """The reported means are the rows' losses, each with the total weight of its labelled tokens."""
    rows = [
        row.model_copy(update={"part": SPLIT_NAMES[0 if row.line < 9 else 1 + row.line % 2]}) for row in make_rows(12)
    ]
    spec = SPEC | {"trainer": {"verdict_weight": verdict_weight}}
    order = make_order(spec, updates=3, rows=rows)  # eight rows to train on: two updates an epoch, half of a second
    events = run(order)
    found = row_losses(order)
    assert [row["line"] for row in found] == list(range(1, 13))
    assert [row["part"] for row in found] == [row.part for row in rows]
    assert [row["tokens"] for row in found] == [len(row.all_ids) for row in rows]
    assert [row["labelled_tokens"] for row in found] == [len(shifted_labels(row)) for row in rows]
    by_update: dict[int, list[dict[str, Any]]] = {}
    for row in found:
        by_update.setdefault(row["update"] if row["part"] == "train" else 0, []).append(row)
    third = by_update[3]
    weights = {row.line: collate([row], verdict_weight).total_weight for row in rows}
    assert len(third) == 4
    assert metrics(events)[2]["loss"] == pytest.approx(weighted_mean(third, weights), rel=1e-6)
    held = [row for row in found if row["part"] == "validation"]
    assert weighted_mean(held, weights) == pytest.approx(events[-1]["metrics"]["validation_loss"], rel=1e-6)
    assert all(math.isfinite(row["loss"]) for row in found)


def test_a_row_that_was_not_reached_has_no_loss(make_order: OrderFactory) -> None:
    order = make_order(SPEC, updates=1)  # four of ten rows
    run(order)
    assert sorted(row["update"] or 0 for row in row_losses(order)) == [0] * 6 + [1] * 4
    assert all((row["loss"] is None) == (row["update"] is None) for row in row_losses(order))


def test_a_pause_aborts_an_evaluation_which_is_repeated_after_resuming(make_order: OrderFactory, start: Start) -> None:
    many = [
        *split_rows(9),
        *(
            row.model_copy(update={"line": 100 + n, "part": SplitName.VALIDATION})
            for n in range(1_000)
            for row in make_rows(1)
        ),
    ]
    spec = SPEC | {"trainer": {"steps_per_checkpoint": 2}}
    first = make_order(spec, updates=3, rows=many, name="first")
    child = start(first)
    child.until("metrics", update=1)
    child.command("pause")
    assert child.finish()[0]["outcome"] == "paused", child.errors()
    at = child.metrics()[-1]
    assert at["validation_loss"] is None
    written = of_kind(child.seen, "checkpoint")[-1]
    assert written["validation_loss"] is None

    again = make_order(spec, updates=3, rows=many, name="again", resume_from=Path(written["path"]))
    whole = make_order(spec, updates=3, rows=many, name="whole")
    resumed, reference = start(again), start(whole)
    for other in (resumed, reference):
        assert other.finish()[0]["outcome"] == "succeeded", other.errors()
    validations = [e["update"] for e in of_kind(resumed.seen, "evaluated") if e["part"] == SplitName.VALIDATION]
    assert validations == [2, 3]
    assert adapter_bytes(again) == adapter_bytes(whole)


def test_checkpoints_hold_the_adapter_of_their_own_update(make_order: OrderFactory) -> None:
    events = run(make_order(SPEC, updates=4, every=2))
    one, other = (Path(event["path"]) for event in of_kind(events, "checkpoint"))
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    masters = load_file(one / "weights.safetensors")
    assert {value.abs().sum().item() for value in first.values()} == {v.abs().sum().item() for v in masters.values()}
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(event["metrics"]["updates"] == event["update"] for event in of_kind(events, "checkpoint"))
