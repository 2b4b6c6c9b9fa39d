"""Every method of the spec: it learns, and what it publishes is what it trained, in stock PEFT and in the engine."""

import io
import json
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.attempts import EncodedRow, TrainOrder
from benchmarks.tuning_methods import served
from tests.training.conftest import OrderFactory
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import decode, prefill
from worker.inference.ipc import EngineSettings
from worker.inference.model.loaded_models import LoadedModels
from worker.precision import FP32
from worker.quantization import bitsandbytes_config
from worker.training import model, recipe
from worker.training.batches import collate
from worker.training.channel import Channel
from worker.training.errors import TrainingError
from worker.training.model import TrainableModel

LORA = {"type": "lora", "r": 4}
NF4 = {"bits": 4}
APPROACHES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, float]] = {
    "full": (None, None, 1e-3),
    "lora": (LORA, None, 1e-2),
    "lora over nf4": (LORA, NF4, 1e-2),
    "lora over fp4": (LORA, {"bits": 4, "quant_type": "fp4", "double_quant": False}, 1e-2),
    "lora over int8": (LORA, {"bits": 8}, 1e-2),
    "rslora": (LORA | {"use_rslora": True}, NF4, 1e-2),
    "dora": (LORA | {"use_dora": True}, NF4, 1e-2),
    "gaussian": (LORA | {"init_lora_weights": "gaussian"}, NF4, 1e-2),
    "pissa": (LORA | {"init_lora_weights": "pissa"}, None, 1e-2),
    "olora": (LORA | {"init_lora_weights": "olora"}, None, 1e-2),
    "olora, scaled by the root of the rank": (LORA | {"init_lora_weights": "olora", "use_rslora": True}, None, 1e-2),
    "adalora": ({"type": "adalora", "init_r": 6, "target_r": 2}, NF4, 3e-2),
    "ia3": ({"type": "ia3"}, None, 1e-1),
    "adaption_prompt": ({"type": "adaption_prompt", "adapter_len": 4}, NF4, 3e-1),
}
IDS = list(range(20, 60))


def trained(order: TrainOrder, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainableModel, list[dict[str, Any]]]:
    """(the model as the training process has it at the end, the events)."""
    seen: list[TrainableModel] = []
    load = model.load_trainable_model

    def remember(*given: Any) -> TrainableModel:
        seen.append(load(*given))
        return seen[-1]

    monkeypatch.setattr(recipe, "load_trainable_model", remember)
    monkeypatch.setattr(recipe, "precision_here", lambda *_: FP32)
    out = io.BytesIO()
    recipe.train(order, Channel(out, io.BytesIO()))
    return seen[0], [json.loads(line) for line in out.getvalue().splitlines()]


def logits_of(trainable: TrainableModel) -> torch.Tensor:
    trainable.method.module.eval()
    with torch.no_grad():
        logits: torch.Tensor = trainable.head(
            trainable.hidden(collate([EncodedRow(line=1, ids=tuple(IDS), trained=())]))
        )
    return logits[-1]


def served_logits(order: TrainOrder) -> torch.Tensor:
    models = LoadedModels(EngineSettings(dtype="float32"))
    models.load(served(order), [])
    store = KVCache(2)
    store.reserve(1, len(IDS))
    prefill(models.forward([served(order)]), store, 0, IDS[:-1])
    return decode(models.forward([served(order)]), store, IDS[-1:], [len(IDS) - 1])[0]


def stock_logits(order: TrainOrder) -> torch.Tensor:
    """Transformers and PEFT alone, over the base as it was quantised."""
    directory, held = order.directory / "adapter", order.spec.quantization
    if order.spec.adapter is None:
        model: Any = AutoModelForCausalLM.from_pretrained(directory)
    else:
        config = held and bitsandbytes_config(
            held.bits, held.quant_type, double_quant=held.double_quant, compute=torch.float32
        )
        base: Any = AutoModelForCausalLM.from_pretrained(order.base.path, quantization_config=config)
        base = base.dequantize(dtype=torch.float32) if held else base
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            model = PeftModel.from_pretrained(base, directory)
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0, -1]
    return logits


@pytest.mark.parametrize("name", APPROACHES)
def test_it_learns_and_publishes_what_it_trained(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter, quantization, rate = APPROACHES[name]
    asked = {"adapter": adapter, "quantization": quantization, "trainer": {"learning_rate": rate}}
    order = make_order(asked, updates=24)
    trainable, events = trained(order, monkeypatch)
    losses = [event["loss"] for event in events if event["event"] == "metrics"]
    assert losses[-1] < 0.9 * losses[0]
    mine = logits_of(trainable)
    torch.testing.assert_close(served_logits(order), mine, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(stock_logits(order), mine, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["full", "dora", "adalora", "pissa"])
def test_a_resumed_run_publishes_the_same_bytes(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter, quantization, rate = APPROACHES[name]
    dropout = {"dropout": 0.1} if adapter and "r" in adapter else {}
    asked = {
        "adapter": adapter and adapter | dropout,
        "quantization": quantization,
        "trainer": {"learning_rate": rate},
    }
    whole = make_order(asked, updates=12, every=7)
    trained(whole, monkeypatch)
    checkpoint = whole.directory / "checkpoints" / "update-000007"
    resumed = make_order(asked, updates=12, every=7, name="resumed", resume_from=checkpoint)
    _, events = trained(resumed, monkeypatch)
    assert [event["update"] for event in events if event["event"] == "metrics"] == list(range(8, 13))
    for path in (whole.directory / "adapter").iterdir():
        assert path.read_bytes() == (resumed.directory / "adapter" / path.name).read_bytes()


def test_adalora_spends_its_budget_and_is_published_as_plain_lora(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, quantization, rate = APPROACHES["adalora"]
    order = make_order(
        {"adapter": adapter, "quantization": quantization, "trainer": {"learning_rate": rate}}, updates=24
    )
    _, events = trained(order, monkeypatch)
    (ranks,) = [event["data"] for event in events if event.get("message") == "remaining ranks"]
    assert len(ranks) == 14  # seven layers in each of two blocks
    assert sum(ranks.values()) == 2 * 14
    assert len(set(ranks.values())) > 1
    config = json.loads((order.directory / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", max(ranks.values()))
    weights = load_file(order.directory / "adapter" / "adapter_model.safetensors")
    for module, rank in ranks.items():
        down = weights[f"base_model.model.{module}.lora_A.weight"]
        assert int((down.abs().sum(1) > 0).sum()) == rank


def test_an_initialiser_that_changes_the_base_is_published_over_the_base_as_it_was(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _, rate = APPROACHES["pissa"]
    order = make_order({"adapter": adapter, "quantization": None, "trainer": {"learning_rate": rate}}, updates=4)
    trained(order, monkeypatch)
    config = json.loads((order.directory / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (2 * 4, True)


def test_a_full_fine_tune_publishes_a_whole_model(make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    order = make_order({"adapter": None, "quantization": None}, updates=2)
    trained(order, monkeypatch)
    files = {path.name for path in (order.directory / "adapter").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
    weights = load_file(order.directory / "adapter" / "model.safetensors")
    before = load_file(order.base.path / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize(
    ("adapter", "code", "words"),
    [
        ({"type": "lora", "r": 40}, "rank_too_large", "at most 32"),
        ({"type": "adalora", "init_r": 40, "target_r": 2}, "rank_too_large", "at most 32"),
        ({"type": "lora", "target_modules": ["nothing"]}, "target_modules", "q_proj"),
        (
            {"type": "ia3", "target_modules": ["nothing"], "feedforward_modules": []},
            "target_modules",
            "q_proj",
        ),
        ({"type": "adaption_prompt", "adapter_layers": 9}, "adapter_does_not_fit", "lora"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(TrainingError) as raised:
        trained(make_order({"adapter": adapter, "quantization": None}), monkeypatch)
    assert raised.value.code == code
    assert words in str(raised.value.hint)


NO_STEP = {"learning_rate": 1e-12}
"""An update that leaves the weights as they are, but for rounding."""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("lora over nf4", LORA),
        ("rslora", LORA | {"use_rslora": True}),
        ("dora", LORA | {"use_dora": True}),
        ("pissa", {"type": "lora", "r": 8, "alpha": 8}),
        ("adalora", {"type": "lora", "r": 6, "alpha": 6}),
        ("ia3", {"type": "ia3"}),
        ("adaption_prompt", {"type": "adaption_prompt", "adapter_len": 4}),
    ],
)
def test_a_training_starts_from_the_weights_of_an_adapter(
    make_order: OrderFactory, monkeypatch: pytest.MonkeyPatch, first: str, then: dict[str, Any]
) -> None:
    adapter, quantization, rate = APPROACHES[first]
    spec = {"adapter": adapter, "quantization": quantization, "trainer": {"learning_rate": rate}}
    earlier = make_order(spec, updates=8, name="earlier")
    before, _events = trained(earlier, monkeypatch)
    start = earlier.directory / "adapter"
    named = then | {"pretrained_adapter_weights": "adp_1"}
    spec |= {"adapter": named, "trainer": NO_STEP}
    after, events = trained(make_order(spec, updates=1, name="later", start_from=start), monkeypatch)
    torch.testing.assert_close(logits_of(after), logits_of(before), rtol=1e-3, atol=1e-3)
    assert any("adapter to start from" in event.get("message", "") for event in events)


def test_initial_weights_of_another_shape_are_refused(make_order: OrderFactory) -> None:
    earlier = make_order({"adapter": LORA}, updates=1, name="earlier")
    recipe.train(earlier, Channel(io.BytesIO(), io.BytesIO()))
    wider = {"adapter": {"type": "lora", "r": 5, "pretrained_adapter_weights": "adp_1"}}
    later = make_order(wider, updates=1, name="later", start_from=earlier.directory / "adapter")
    with pytest.raises(TrainingError) as refused:
        recipe.train(later, Channel(io.BytesIO(), io.BytesIO()))
    assert refused.value.code == "adapter_does_not_fit"
