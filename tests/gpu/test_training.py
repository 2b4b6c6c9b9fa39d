"""Training on a GPU: QLoRA learns, in this GPU's own precision and in a T4's, and what it learned is served there."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.test_mixed_adapters import PROMPTS, order_of, word
from tests.tiny import make_tiny_model
from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import EngineOutput, EngineSettings, Finished, Generate
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import SamplingParams, ServedModel
from worker.precision import FP16, precision_here
from worker.training import recipe
from worker.training.channel import Channel

pytestmark = pytest.mark.gpu
NF4 = {"bits": 4, "type": "nf4", "double": True}
FOUR_BITS = {"bits": 4}


@pytest.mark.parametrize("precision", ["here", "t4"])
def test_an_adapter_is_learned_over_nf4_and_says_its_word(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if precision == "t4":
        monkeypatch.setattr(recipe, "precision_here", lambda *_: FP16)
    base = make_tiny_model(tmp_path / "base")
    order = order_of(base, tmp_path / "job", 3, updates=60, quantization=FOUR_BITS)
    out = io.BytesIO()
    recipe.train(order, Channel(out, io.BytesIO()))
    told = [json.loads(line) for line in out.getvalue().splitlines()]

    started = next(event for event in told if event["event"] == "started")
    assert started["device"] == torch.cuda.get_device_name(gpu)
    assert started["precision"] == ("fp16" if precision == "t4" else precision_here(gpu, "unknown").name)
    losses = [event["loss"] for event in told if event["event"] == "metrics" and event["loss"] is not None]
    assert losses[-1] < 0.1 * losses[0]
    assert answers(base, tmp_path / "job" / "adapter") == [word(3)] * len(PROMPTS)


APPROACHES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "full": (None, None),
    "dora": ({"type": "lora", "use_dora": True}, FOUR_BITS),
    "adalora": ({"type": "adalora"}, FOUR_BITS),
    "ia3": ({"type": "ia3"}, None),
    "adaption_prompt": ({"type": "adaption_prompt"}, FOUR_BITS),
}


@pytest.mark.parametrize("approach", APPROACHES)
def test_every_approach_learns(tmp_path: Path, approach: str) -> None:
    adapter, quantization = APPROACHES[approach]
    base = make_tiny_model(tmp_path / "base")
    order = order_of(base, tmp_path / "job", 3, updates=20, adapter=adapter, quantization=quantization)
    out = io.BytesIO()
    recipe.train(order, Channel(out, io.BytesIO()))
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    losses = [event["loss"] for event in told if event["event"] == "metrics"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


def answers(base: Path, adapter: Path) -> list[list[int]]:
    settings = EngineSettings(device="cuda", dtype="float16")
    said: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(settings), settings, said.append)
    model = ServedModel(
        digest="speaker",
        base_digest="base",
        base_path=str(base),
        quantization=NF4,
        adapter_path=str(adapter),
        max_model_len=256,
    )
    sampling = SamplingParams(max_tokens=len(word(3)), temperature=0, ignore_eos=True)
    for place, prompt in enumerate(PROMPTS):
        scheduler.add(Generate(id=str(place), model=model, prompt=prompt, sampling=sampling))
    while scheduler.has_work or scheduler.is_loading:
        scheduler.step()
    found: dict[str, Any] = {message.id: message.token_ids for message in said if isinstance(message, Finished)}
    return [found[str(place)] for place in range(len(PROMPTS))]
