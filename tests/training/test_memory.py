"""Too little memory: the micro-batch is halved, the effective batch stays, and the job goes on."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.domain.attempts import TrainOrder
from app.domain.memory import MAX_HOLES
from tests.training.conftest import OrderFactory, make_rows
from worker.training import model, recipe
from worker.training.batches import MicroBatch
from worker.training.channel import Channel
from worker.training.memory import find_max_tokens, is_out_of_memory, resident_bytes
from worker.training.model import TrainableModel

Run = Callable[[TrainOrder, int], list[dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train on a device that has room for so many tokens at once."""

    def train(order: TrainOrder, room: int) -> list[dict[str, Any]]:
        def load(*given: Any) -> TrainableModel:
            trainable = model.load_trainable_model(*given)

            def hidden(batch: MicroBatch) -> torch.Tensor:
                if batch.tokens > room:
                    torch.rand(3)  # something was drawn already when the memory ran out
                    raise torch.OutOfMemoryError
                return trainable.hidden(batch)

            return replace(trainable, hidden=hidden)

        monkeypatch.setattr(recipe, "load_trainable_model", load)
        out = io.BytesIO()
        recipe.train(order, Channel(out, io.BytesIO()))
        return [json.loads(line) for line in out.getvalue().splitlines()]

    return train


def warnings_in(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("level") == "warning"]


def metrics_in(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "metrics"]


def test_the_micro_batch_is_halved_and_the_effective_batch_stays(make_order: OrderFactory, run: Run) -> None:
    ample, narrow = make_order(updates=6, name="ample"), make_order(updates=6, name="narrow")
    wanted, found = run(ample, 1_000), run(narrow, 50)
    assert not warnings_in(wanted)
    (warning,) = warnings_in(found)
    assert "at most" in warning["message"]
    assert warning["data"]["max_tokens"] <= 50
    for mine, theirs in zip(metrics_in(found), metrics_in(wanted), strict=True):
        assert (mine["tokens"], mine["labelled_tokens"]) == (theirs["tokens"], theirs["labelled_tokens"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_a_resumed_run_keeps_the_size_and_gives_the_same_bytes(make_order: OrderFactory, run: Run) -> None:
    dropout = {"adapter": {"type": "lora", "r": 4, "dropout": 0.2}}
    whole = make_order(dropout, updates=8, every=3, name="whole")
    run(whole, 50)
    checkpoint = whole.directory / "checkpoints" / "update-000003"
    resumed = make_order(dropout, updates=8, every=3, name="resumed", resume_from=checkpoint)
    assert not warnings_in(run(resumed, 50))
    for path in (whole.directory / "adapter").iterdir():
        assert path.read_bytes() == (resumed.directory / "adapter" / path.name).read_bytes()


def test_the_holes_that_a_micro_batch_leaves_are_returned_before_the_next(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, kept = list[int](), list[bytearray]()

    def load(*given: Any) -> TrainableModel:
        trainable = model.load_trainable_model(*given)

        def hidden(batch: MicroBatch) -> torch.Tensor:
            resident.append(resident_bytes())
            if len(resident) == 3:
                kept.extend([bytearray(50_000) for _ in range(2 * MAX_HOLES // 50_000)][::100])
                resident.append(resident_bytes())
            return trainable.hidden(batch)

        return replace(trainable, hidden=hidden)

    monkeypatch.setattr(recipe, "load_trainable_model", load)
    recipe.train(make_order(updates=5), Channel(io.BytesIO(), io.BytesIO()))
    before, with_holes, after = resident[2:5]
    assert with_holes > before + MAX_HOLES
    assert after < before + MAX_HOLES // 2
    assert kept


def test_a_single_row_that_does_not_fit_ends_the_job(make_order: OrderFactory, run: Run) -> None:
    with pytest.raises(MemoryError) as raised:
        run(make_order(), 10)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(("room", "wanted"), [(368, 400), (367, 184), (184, 184), (150, 92), (46, 46), (10, 46)])
def test_a_probe_finds_what_fits(room: int, wanted: int) -> None:
    """Eight of the longest rows, of 46 tokens, fill 400; of a single one nothing is left to halve."""

    def use(batch: MicroBatch) -> None:
        if batch.tokens > room:
            raise torch.OutOfMemoryError

    assert find_max_tokens(use, make_rows(7), None, 400) == wanted


def test_other_errors_pass_through() -> None:
    def use(_: MicroBatch) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        find_max_tokens(use, make_rows(3), None, 100)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_too_little_memory_is_recognised(error: Exception, found: bool) -> None:
    assert is_out_of_memory(error) is found
