"""Sixteen adapters, each trained on a word of its own, in one batch: no request gets another adapter's word."""

import io
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from app.domain.attempts import BaseOnDisk, EncodedRow, TrainOrder
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from tests.tiny import make_tiny_model
from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import EngineOutput, EngineSettings, Finished, Generate
from worker.inference.model.adapter_slots import AdapterSlots
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.lora import LoraBatch
from worker.inference.sampling_params import SamplingParams, ServedModel
from worker.precision import FP32
from worker.training import recipe
from worker.training.channel import Channel

COUNT, LETTERS = 16, 4
PROMPTS = [list(range(30, 41)), list(range(90, 97)), list(range(200, 223)), [300, 17, 254]]
MODULES = ["all-linear", ["q_proj", "v_proj", "down_proj"], ["gate_proj", "up_proj", "down_proj", "o_proj"]]


def word(number: int) -> list[int]:
    """The token ids that this adapter learns; they are no other adapter's."""
    return [100 + number, 250 - number, 150 + 2 * number, 300 + number]


def order_of(base: Path, directory: Path, number: int, updates: int = 40, **more: Any) -> TrainOrder:
    """An order to learn that word after every prompt. Ranks and layers differ. `more`: further keys of the spec."""
    directory.mkdir()
    rows = [
        EncodedRow(line=line, ids=(*prompt, *word(number)), trained=((len(prompt), len(prompt) + LETTERS),))
        for line, prompt in enumerate(PROMPTS, 1)
    ]
    (directory / "rows.jsonl").write_text("".join(f"{row.model_dump_json()}\n" for row in rows))
    asked = {
        "dataset": "d",
        "adapter": {"type": "lora", "r": 2 + number % 5, "target_modules": MODULES[number % len(MODULES)]},
        "quantization": None,
        "trainer": {"train_steps": updates, "effective_batch_size": len(rows), "learning_rate": 2e-2},
        **more,
    }
    spec = TrainSpec.model_validate(asked)
    return TrainOrder(
        job_id="job",
        epoch=1,
        base=BaseOnDisk(path=base, digest="0" * 64, name="tiny", revision="r1"),
        rows=directory / "rows.jsonl",
        directory=directory,
        resume_from=None,
        spec=spec,
        schedule=Schedule.for_spec(spec, len(rows), 64, "cpu", 0).model_copy(update={"checkpoint_every": 1_000}),
    )


def train(base: Path, directory: Path, number: int) -> ServedModel:
    recipe.train(order_of(base, directory, number), Channel(io.BytesIO(), io.BytesIO()))
    return ServedModel(
        digest=f"adapter{number}",
        base_digest="base",
        base_path=str(base),
        adapter_path=str(directory / "adapter"),
        max_model_len=256,
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServedModel]]:
    folder = tmp_path_factory.mktemp("adapters")
    base = make_tiny_model(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "precision_here", lambda *_: FP32)
        yield [train(base, folder / str(number), number) for number in range(COUNT)]


def complete(adapters: list[ServedModel], at_once: int) -> dict[tuple[str, int], list[int]]:
    """(adapter, index of the prompt) → the completion, with up to `at_once` requests in a batch."""
    settings = EngineSettings(device="cpu", dtype="float32", max_batch=at_once, prefix_cache_bytes=0)
    outputs: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(settings), settings, outputs.append)
    asked = [(model, index) for index in range(len(PROMPTS)) for model in adapters]
    sampling = SamplingParams(max_tokens=LETTERS, temperature=0, ignore_eos=True)
    for model, index in asked:
        name = f"{model.digest}/{index}"
        scheduler.add(Generate(id=name, model=model, prompt=PROMPTS[index], sampling=sampling))
    while scheduler.has_work or scheduler.is_loading:
        scheduler.step()
    by_id = {message.id: message.token_ids for message in outputs if isinstance(message, Finished)}
    return {(model.digest, index): by_id[f"{model.digest}/{index}"] for model, index in asked}


@pytest.fixture(scope="module")
def alone(adapters: list[ServedModel]) -> dict[tuple[str, int], list[int]]:
    return complete(adapters, at_once=1)


def test_every_adapter_generates_its_word(alone: dict[tuple[str, int], list[int]]) -> None:
    learned = [answer == word(int(name.removeprefix("adapter"))) for (name, _index), answer in alone.items()]
    assert sum(learned) >= 0.9 * len(learned)


def test_two_adapters_give_different_completions(
    adapters: list[ServedModel], alone: dict[tuple[str, int], list[int]]
) -> None:
    pairs = [
        alone[one.digest, index] != alone[other.digest, index]
        for one, other in combinations(adapters, 2)
        for index in range(len(PROMPTS))
    ]
    assert sum(pairs) >= 0.95 * len(pairs)


@pytest.mark.parametrize("at_once", [5, 64])
def test_completions_in_a_batch_are_those_of_requests_alone(
    adapters: list[ServedModel], alone: dict[tuple[str, int], list[int]], at_once: int
) -> None:
    assert complete(adapters, at_once) == alone


def test_two_swapped_slots_would_be_noticed(
    adapters: list[ServedModel], alone: dict[tuple[str, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = AdapterSlots.select

    def swapped(self: AdapterSlots, *given: Any, **more: Any) -> LoraBatch | None:
        found = select(self, *given, **more)
        if found is None or found.other_adapter_mask is None:
            return found
        return found._replace(
            other_adapter_mask=found.other_adapter_mask[:, [1, 0, *range(2, found.other_adapter_mask.shape[1])]]
        )

    monkeypatch.setattr(AdapterSlots, "select", swapped)
    assert complete(adapters, at_once=64) != alone
