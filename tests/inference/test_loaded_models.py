"""Bases and adapters as they are loaded: what is refused, what is dropped, and the function that is served."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import AdaptionPromptConfig, IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.inference.conftest import NF4, PROMPT, Shelf
from tests.inference.test_llama_forward import adapter
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import prefill
from worker.inference.errors import ModelError, OutOfMemory
from worker.inference.ipc import EngineSettings
from worker.inference.model import adapters
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, MemoryUse, base_bytes, budget, weights_bytes
from worker.inference.sampling_params import ServedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
SETTINGS = EngineSettings(device="cpu", dtype="float32", max_rank=8)


def room_for(shelf: Shelf, *, bases: int = 1, adapters: int = 1) -> EngineSettings:
    """Memory for so many, and for a quarter of an adapter more."""
    base = base_bytes(shelf.served("base"), torch.device("cpu"), torch.float32)
    adapter = size_of_one(shelf)
    memory = bases * base + adapters * adapter + adapter // 4
    return SETTINGS.model_copy(
        update={"memory_bytes": PROCESS_BYTES["cpu"] + memory + 2, "kv_bytes": 1, "prefix_cache_bytes": 1}
    )


def size_of_one(shelf: Shelf) -> int:
    """What the first adapter takes, which is more than the second."""
    models = LoadedModels(SETTINGS)
    models.load(shelf.served("base"), [])
    base = models.memory
    models.load(shelf.served("one", shelf.one), [])
    return sum(models.memory.minus(base))


def logits(models: LoadedModels, served: ServedModel) -> torch.Tensor:
    """What a model says behind the usual prompt."""
    store = KVCache(models.load(served, []).kv_shape.num_layers)
    store.reserve(1, len(PROMPT))
    return prefill(models.forward([served]), store, 0, PROMPT)


def spoilt(shelf: Shelf, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A copy of the first adapter, its config changed."""
    copy = Path(shutil.copytree(shelf.one, folder / "copy"))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return copy


def refusal(shelf: Shelf, adapter: Path) -> str:
    """Why an adapter is refused; the base must be left as it was, and take a good adapter after it."""
    models = LoadedModels(SETTINGS)
    before = logits(models, shelf.served("base"))
    with pytest.raises(ModelError) as caught:
        models.load(shelf.served("bad", adapter), [])
    assert torch.equal(logits(models, shelf.served("base")), before)
    assert not torch.equal(logits(models, shelf.served("one", shelf.one)), before)
    assert str(adapter) not in str(caught.value)
    return str(caught.value)


def test_nf4_is_served_as_the_function_that_training_sees(shelf: Shelf) -> None:
    untyped: Any = BitsAndBytesConfig
    config = untyped(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    stock = AutoModelForCausalLM.from_pretrained(shelf.base, dtype=torch.float32, quantization_config=config).train()
    trained_on = stock(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()

    models = LoadedModels(SETTINGS)
    model = shelf.served("nf4", base_digest="nf4", quantization=NF4)
    served = models.load(model, [])

    assert any(isinstance(module, Linear4bit) for module in stock.modules())
    assert not any(isinstance(module, Linear4bit) for module in served.model.modules())
    torch.testing.assert_close(logits(models, model), trained_on, rtol=1e-4, atol=1e-4)
    assert (
        logits(LoadedModels(SETTINGS), shelf.served("base")) - trained_on
    ).abs().max() > 0.1  # quantisation is not nothing here


def test_one_adapter_at_a_time_and_none_for_the_base(shelf: Shelf) -> None:
    models = LoadedModels(room_for(shelf))
    base = logits(models, shelf.served("base"))
    one = logits(models, shelf.served("one", shelf.one))
    two = logits(models, shelf.served("two", shelf.two))

    assert models.num_adapters == 1  # the least recently used one went
    assert torch.equal(logits(models, shelf.served("base")), base)
    assert torch.equal(logits(models, shelf.served("one", shelf.one)), one)
    assert not torch.equal(one, two)


def test_the_base_goes_that_was_used_least_recently(shelf: Shelf) -> None:
    first, second, third = (shelf.served(name, base_digest=name) for name in ("first", "second", "third"))
    models = LoadedModels(room_for(shelf, bases=2))
    for model in (first, second, first, third):
        models.load(model, [])
    assert [models.has_base(model) for model in (first, second, third)] == [True, False, True]


def test_what_is_in_use_is_never_dropped(shelf: Shelf) -> None:
    models = LoadedModels(room_for(shelf, adapters=1))
    one, two = shelf.served("one", shelf.one), shelf.served("two", shelf.two)
    models.load(one, [])

    with pytest.raises(OutOfMemory):
        models.load(two, [one])
    with pytest.raises(OutOfMemory):
        models.load(shelf.served("other", base_digest="other"), [one])
    assert (models.num_bases, models.num_adapters) == (1, 1)

    models.load(shelf.served("other", base_digest="other"), [])
    assert (models.num_bases, models.num_adapters) == (1, 0)


def test_adapters_go_before_bases(shelf: Shelf) -> None:
    models = LoadedModels(room_for(shelf, bases=2, adapters=1))
    models.load(shelf.served("one", shelf.one), [])
    models.load(shelf.served("two", shelf.two, base_digest="other"), [])

    assert (models.num_bases, models.num_adapters) == (2, 1)


def test_the_places_of_a_batch_make_way_for_an_adapter(shelf: Shelf) -> None:
    one, two, third = shelf.served("one", shelf.one), shelf.served("two", shelf.two), shelf.served("third", shelf.one)
    models = LoadedModels(room_for(shelf, adapters=2))
    before = logits(models, one)
    models.load(two, [])
    models.forward([one, two])
    taken = models.memory

    models.load(third, [])

    assert models.memory.device < taken.device
    assert torch.equal(logits(models, third), before)
    models.load(shelf.served("base"), [])
    models.forward([third, shelf.served("base")])


ALONE = {
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adaption_prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=8, adapter_layers=2),
}


@pytest.mark.parametrize("kind", ALONE)
def test_an_adapter_with_a_base_to_itself_goes_together_with_it(shelf: Shelf, tmp_path: Path, kind: str) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(shelf.base), ALONE[kind]).save_pretrained(str(tmp_path))
    alone, base = shelf.served("alone", tmp_path, base_digest="alone"), shelf.served("base")
    models = LoadedModels(room_for(shelf, bases=2, adapters=0))
    before = logits(models, alone)

    logits(models, base)
    models.load(shelf.served("other", base_digest="other"), [])

    assert torch.equal(logits(models, alone), before)


def test_what_fits_into_no_memory_is_refused_with_the_figures(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match=r"base model base takes memory to .* GB; bases and adapters may have"):
        LoadedModels(room_for(shelf, bases=0)).load(shelf.served("base"), [])

    models = LoadedModels(room_for(shelf, adapters=0))
    with pytest.raises(ModelError, match="adapter one takes memory to"):
        models.load(shelf.served("one", shelf.one), [])
    models.load(shelf.served("base"), [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_models_take_is_known_before_they_are_loaded(shelf: Shelf, dtype: Any) -> None:
    settings = SETTINGS.model_copy(update={"dtype": dtype})
    models = LoadedModels(settings)
    models.load(shelf.served("base"), [])
    foreseen = base_bytes(shelf.served("base"), models.device, models.dtype)
    assert models.memory.device == pytest.approx(foreseen, rel=0.1)
    before = models.memory
    models.load(shelf.served("one", shelf.one), [])
    taken = models.memory.minus(before).device
    assert taken > weights_bytes(shelf.one, models.dtype)
    if models.dtype is torch.float32:  # in bfloat16 ranks may be padded
        assert taken <= 2 * weights_bytes(shelf.one, models.dtype), "B is block-diagonal"


def test_an_adapter_with_nan_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    adapter = spoilt(shelf, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")

    assert "NaN" in refusal(shelf, adapter)


def test_a_torn_adapter_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    adapter = spoilt(shelf, tmp_path)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])

    assert "adapter_model.safetensors" in refusal(shelf, adapter)


def test_an_adapter_with_a_missing_layer_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    adapter = spoilt(shelf, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(key for key in weights if "lora_B" in key))
    save_file(weights, adapter / "adapter_model.safetensors")

    assert "missing" in refusal(shelf, adapter)


def test_an_adapter_of_another_base_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    adapter = spoilt(shelf, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    wider = {key: torch.cat([tensor, tensor], dim=1) for key, tensor in weights.items() if "lora_A" in key}
    save_file({**weights, **wider}, adapter / "adapter_model.safetensors")

    assert "does not fit" in refusal(shelf, adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"r": 9}, "rank 9"),
        ({"r": "9"}, "no whole number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "no whole number"),
        ({"lora_alpha": None}, "does not fit"),
        ({"init_lora_weights": "pissa_niter_4"}, "convert"),
        ({"target_modules": ["nothing"]}, "does not fit"),
        ({"target_modules": 7}, "a"),
    ],
)
def test_an_adapter_that_cannot_be_served_says_why(
    shelf: Shelf, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    assert words in refusal(shelf, spoilt(shelf, tmp_path, config))


def test_a_missing_base_is_refused_without_its_path(shelf: Shelf, tmp_path: Path) -> None:
    gone = shelf.served("base").model_copy(update={"base_path": str(tmp_path / "gone")})

    with pytest.raises(ModelError, match="base model base cannot be loaded") as caught:
        LoadedModels(SETTINGS).load(gone, [])
    assert "gone" not in str(caught.value)


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters count as they do where the device has a memory of its own."""
    monkeypatch.setattr(adapters, "adapter_memory", lambda size, _: MemoryUse(host=size))


@pytest.mark.usefixtures("beside_a_gpu")
def test_adapters_beside_a_gpu_take_the_hosts_memory(shelf: Shelf) -> None:
    one, two, third = shelf.served("one", shelf.one), shelf.served("two", shelf.two), shelf.served("third", shelf.one)
    size = size_of_one(shelf)
    held = LoadedModels(room_for(shelf, adapters=1).model_copy(update={"host_bytes": 2 * size}))
    held.load(shelf.served("base"), [])
    base = held.memory
    held.load(one, [])
    held.load(two, [])
    assert held.memory.device == base.device
    assert size < held.memory.host <= 2 * size

    held.forward([one])
    held.load(third, [])
    assert list(held._bases["base"].loaded) == ["one", "third"], "the least recently used one went"
    with pytest.raises(OutOfMemory):
        held.load(shelf.served("fourth", shelf.one), [one, third])
    small = LoadedModels(room_for(shelf, adapters=1).model_copy(update={"host_bytes": size // 2}))
    with pytest.raises(ModelError, match=r"adapter one takes the host's memory to .* GB; adapters may have"):
        small.load(one, [])


@pytest.mark.usefixtures("beside_a_gpu")
def test_what_gives_the_device_no_memory_back_stays(shelf: Shelf) -> None:
    held = LoadedModels(room_for(shelf, bases=2, adapters=1))
    held.load(shelf.served("one", shelf.one), [])
    held.load(shelf.served("second", base_digest="second"), [])
    with pytest.raises(OutOfMemory):
        held.load(
            shelf.served("third", base_digest="third"), [shelf.served("base"), shelf.served("s", base_digest="second")]
        )
    assert (held.num_bases, held.num_adapters) == (2, 1)


def test_places_keep_within_the_budget(shelf: Shelf) -> None:
    known = [shelf.served(str(n), shelf.two if n % 2 else shelf.one) for n in range(4)]
    held = LoadedModels(room_for(shelf, adapters=4))
    for model in known:
        held.load(model, known)
    held.reserve_slots(known[0], [], [])
    with pytest.raises(OutOfMemory):
        held.reserve_slots(known[0], known[1:], known[1:])
    assert held.num_adapters == 4
    held.reserve_slots(known[0], known[1:2], known[1:2])  # what is idle goes for it
    held.forward(known[:2])
    assert 2 <= held.num_adapters < 4
    assert not any(held._evictor.missing(MemoryUse(1)))


@pytest.mark.usefixtures("beside_a_gpu")
def test_an_adapter_whose_place_is_there_needs_no_more_of_the_device(shelf: Shelf) -> None:
    known = [shelf.served(str(n), shelf.one) for n in range(4)]
    spare = LoadedModels(SETTINGS)
    for model in known[:3]:
        spare.load(model, [])
    spare.reserve_slots(known[2], known[:2], known[:2])
    memory = spare.memory.device + 1
    held = LoadedModels(
        SETTINGS.model_copy(
            update={"memory_bytes": PROCESS_BYTES["cpu"] + memory + 2, "kv_bytes": 1, "prefix_cache_bytes": 1}
        )
    )
    for number, model in enumerate(known):
        held.load(model, known[:number])
        held.reserve_slots(model, known[:number], known[:number])
    assert held.memory.device < memory


@pytest.mark.parametrize("loaded", [True, False])
def test_what_does_not_fit_evicts_nothing(shelf: Shelf, loaded: bool) -> None:
    """No size is counted twice among what might be evicted: an idle base includes its adapters."""
    third, *in_use = [shelf.served(str(n), shelf.one) for n in range(3)]
    idle = [shelf.served(f"idle{n}", shelf.one, base_digest="idle") for n in range(3)]
    size = size_of_one(shelf)
    outcomes = set()
    for cut in range(0, 24 * size, 2 * size):
        held = LoadedModels(SETTINGS)
        for model in [*in_use, *idle, *([third] if loaded else [])]:
            held.load(model, [])
        held.reserve_slots(in_use[0], in_use[1:], in_use)
        held._evictor.budget = held.memory.minus(MemoryUse(cut))
        for attempt in (held.load, partial(held.reserve_slots, running=in_use)):
            before = held.num_bases, held.num_adapters
            try:
                attempt(third, in_use=in_use)
            except OutOfMemory:
                assert (held.num_bases, held.num_adapters) == before
                outcomes.add("refused")
                break
        else:
            outcomes.add("fits")
    assert outcomes == {"refused", "fits"}


def test_places_that_would_have_to_be_made_anew_are_no_room(shelf: Shelf) -> None:
    base, one, two = shelf.served("base"), shelf.served("one", shelf.one), shelf.served("two", shelf.two)
    held = LoadedModels(SETTINGS)
    held.load(two, [])
    held.reserve_slots(two, [base], [base])
    held.forward([two, base])
    slots = held._bases["base"].slots_memory.device
    held.load(one, [])
    held._bases["base"].evict_adapter("two")
    needed: list[int] = []
    held._bases["base"].reserve_slots(["one", None], lambda growth: needed.append(growth().device))
    held._bases["base"].reserve_slots([None], lambda _: None)
    held._evictor.budget = held.memory.plus(MemoryUse(needed[0] - slots // 2))
    assert min(needed[0], slots) > 0
    with pytest.raises(OutOfMemory):
        held.reserve_slots(one, [base], [base])


def test_what_was_promised_to_a_batch_stays_so_beside_one_that_does_not_mix(shelf: Shelf, tmp_path: Path) -> None:
    elsewhere = shelf.served("elsewhere", adapter(shelf.base, tmp_path / "dora", use_dora=True))
    one, two = shelf.served("one", shelf.one), shelf.served("two", shelf.two)
    held = LoadedModels(SETTINGS)
    for model in (one, two, elsewhere):
        held.load(model, [])
    before = held.memory
    held.reserve_slots(two, [one], [one])
    promised = held.memory
    held.reserve_slots(elsewhere, [], [one, two])
    assert held.memory == promised != before
    held.reserve_slots(one, [], [])
    assert held.memory == before


@pytest.mark.parametrize("gigabytes", [1, 64])
def test_what_there_is_is_shared_out_however_much_that_is(gigabytes: int) -> None:
    room = gigabytes << 30
    settings = EngineSettings(memory_bytes=PROCESS_BYTES["cpu"] + room)
    live, prefixes, models = budget(settings, torch.device("cpu"))
    assert (live, prefixes, models.device) == (room // 4, room // 16, room - room // 4 - room // 16)
