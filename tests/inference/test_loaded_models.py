"""Loading bases and adapters: which ones are refused, which ones are evicted, and the logits that are served."""

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

from tests.inference.conftest import NF4, PROMPT, TinyModels
from tests.inference.test_llama_forward import adapter
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.offline import prefill
from worker.inference.errors import ModelError, OutOfMemory
from worker.inference.ipc import EngineSettings
from worker.inference.model import adapters
from worker.inference.model.batch_invariance import product_shapes
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, MemoryUse, base_bytes, budget, weights_bytes
from worker.inference.sampling_params import ServedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
SETTINGS = EngineSettings(device="cpu", dtype="float32", max_rank=8)


def settings_for(tiny: TinyModels, *, bases: int = 1, adapters: int = 1) -> EngineSettings:
    """Settings with memory for so many bases and adapters, and a quarter of an adapter."""
    base = base_bytes(tiny.served("base"), torch.device("cpu"), torch.float32)
    adapter = adapter_size(tiny)
    memory = bases * base + adapters * adapter + adapter // 4
    return SETTINGS.model_copy(
        update={"memory_bytes": PROCESS_BYTES["cpu"] + memory + 2, "kv_bytes": 1, "prefix_cache_bytes": 1}
    )


def adapter_size(tiny: TinyModels) -> int:
    """Bytes of the first adapter, which is larger than the second."""
    models = LoadedModels(SETTINGS)
    models.load(tiny.served("base"), [])
    base = models.memory
    models.load(tiny.served("one", tiny.one), [])
    return sum(models.memory.minus(base))


def logits(models: LoadedModels, served: ServedModel) -> torch.Tensor:
    """A model's logits after the default prompt."""
    kv_cache = KVCache(models.load(served, []).kv_shape.num_layers)
    kv_cache.reserve(1, len(PROMPT))
    return prefill(models.forward([served]), kv_cache, 0, PROMPT)


def copy_adapter(tiny: TinyModels, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A copy of the first adapter with changes to its config."""
    copy = Path(shutil.copytree(tiny.one, folder / "copy"))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return copy


def refusal(tiny: TinyModels, adapter: Path) -> str:
    """The reason why an adapter is refused. The base is unchanged by it, and takes a good adapter afterwards."""
    models = LoadedModels(SETTINGS)
    before = logits(models, tiny.served("base"))
    with pytest.raises(ModelError) as caught:
        models.load(tiny.served("bad", adapter), [])
    assert torch.equal(logits(models, tiny.served("base")), before)
    assert not torch.equal(logits(models, tiny.served("one", tiny.one)), before)
    assert str(adapter) not in str(caught.value)
    return str(caught.value)


def test_nf4_is_served_with_the_logits_of_training(tiny: TinyModels) -> None:
    untyped: Any = BitsAndBytesConfig
    config = untyped(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    stock = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32, quantization_config=config).train()
    trained_on = stock(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()

    models = LoadedModels(SETTINGS)
    model = tiny.served("nf4", base_digest="nf4", quantization=NF4)
    served = models.load(model, [])

    assert any(isinstance(module, Linear4bit) for module in stock.modules())
    assert not any(isinstance(module, Linear4bit) for module in served.model.modules())
    torch.testing.assert_close(logits(models, model), trained_on, rtol=1e-4, atol=1e-4)
    assert (
        logits(LoadedModels(SETTINGS), tiny.served("base")) - trained_on
    ).abs().max() > 0.1  # quantisation makes a difference here


def test_adapters_take_turns_in_memory_for_one(tiny: TinyModels) -> None:
    models = LoadedModels(settings_for(tiny))
    base = logits(models, tiny.served("base"))
    one = logits(models, tiny.served("one", tiny.one))
    two = logits(models, tiny.served("two", tiny.two))

    assert models.num_adapters == 1  # the least recently used one was evicted
    assert torch.equal(logits(models, tiny.served("base")), base)
    assert torch.equal(logits(models, tiny.served("one", tiny.one)), one)
    assert not torch.equal(one, two)


def test_the_least_recently_used_base_is_evicted(tiny: TinyModels) -> None:
    first, second, third = (tiny.served(name, base_digest=name) for name in ("first", "second", "third"))
    models = LoadedModels(settings_for(tiny, bases=2))
    for model in (first, second, first, third):
        models.load(model, [])
    assert [models.has_base(model) for model in (first, second, third)] == [True, False, True]


def test_models_in_use_are_never_evicted(tiny: TinyModels) -> None:
    models = LoadedModels(settings_for(tiny, adapters=1))
    one, two = tiny.served("one", tiny.one), tiny.served("two", tiny.two)
    models.load(one, [])

    with pytest.raises(OutOfMemory):
        models.load(two, [one])
    with pytest.raises(OutOfMemory):
        models.load(tiny.served("other", base_digest="other"), [one])
    assert (models.num_bases, models.num_adapters) == (1, 1)

    models.load(tiny.served("other", base_digest="other"), [])
    assert (models.num_bases, models.num_adapters) == (1, 0)


def test_adapters_are_evicted_before_bases(tiny: TinyModels) -> None:
    models = LoadedModels(settings_for(tiny, bases=2, adapters=1))
    models.load(tiny.served("one", tiny.one), [])
    models.load(tiny.served("two", tiny.two, base_digest="other"), [])

    assert (models.num_bases, models.num_adapters) == (2, 1)


def test_the_idle_slots_of_a_batch_are_freed_for_an_adapter(tiny: TinyModels) -> None:
    one, two, third = tiny.served("one", tiny.one), tiny.served("two", tiny.two), tiny.served("third", tiny.one)
    models = LoadedModels(settings_for(tiny, adapters=2))
    before = logits(models, one)
    models.load(two, [])
    models.forward([one, two])
    taken = models.memory

    models.load(third, [])

    assert models.memory.device < taken.device
    assert torch.equal(logits(models, third), before)
    models.load(tiny.served("base"), [])
    models.forward([third, tiny.served("base")])


NOT_LORA = {
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adaption_prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=8, adapter_layers=2),
}


@pytest.mark.parametrize("kind", NOT_LORA)
def test_an_adapter_that_owns_its_base_is_evicted_with_it(tiny: TinyModels, tmp_path: Path, kind: str) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.base), NOT_LORA[kind]).save_pretrained(str(tmp_path))
    owner, base = tiny.served("owner", tmp_path, base_digest="owner"), tiny.served("base")
    models = LoadedModels(settings_for(tiny, bases=2, adapters=0))
    before = logits(models, owner)

    logits(models, base)
    models.load(tiny.served("other", base_digest="other"), [])

    assert torch.equal(logits(models, owner), before)


def test_a_model_that_never_fits_is_refused_with_the_figures(tiny: TinyModels) -> None:
    with pytest.raises(ModelError, match=r"base model base takes memory to .* GB; bases and adapters may have"):
        LoadedModels(settings_for(tiny, bases=0)).load(tiny.served("base"), [])

    models = LoadedModels(settings_for(tiny, adapters=0))
    with pytest.raises(ModelError, match="adapter one takes memory to"):
        models.load(tiny.served("one", tiny.one), [])
    models.load(tiny.served("base"), [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_models_is_known_before_they_are_loaded(tiny: TinyModels, dtype: Any) -> None:
    settings = SETTINGS.model_copy(update={"dtype": dtype})
    models = LoadedModels(settings)
    models.load(tiny.served("base"), [])
    predicted = base_bytes(tiny.served("base"), models.device, models.dtype)
    assert models.memory.device == pytest.approx(predicted, rel=0.1)
    before = models.memory
    models.load(tiny.served("one", tiny.one), [])
    taken = models.memory.minus(before).device
    assert taken > weights_bytes(tiny.one, models.dtype)
    # B is block-diagonal, and a rank of 4 may be padded with zeros to the columns that a product needs.
    padding = max(1, product_shapes(torch.zeros(1, dtype=models.dtype)).min_columns // 4)
    assert taken <= 2 * padding * weights_bytes(tiny.one, models.dtype)


def test_an_adapter_with_nan_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = copy_adapter(tiny, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")

    assert "NaN" in refusal(tiny, adapter)


def test_a_truncated_adapter_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = copy_adapter(tiny, tmp_path)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])

    assert "adapter_model.safetensors" in refusal(tiny, adapter)


def test_an_adapter_with_a_missing_layer_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = copy_adapter(tiny, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(key for key in weights if "lora_B" in key))
    save_file(weights, adapter / "adapter_model.safetensors")

    assert "missing" in refusal(tiny, adapter)


def test_an_adapter_of_another_base_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = copy_adapter(tiny, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    wider = {key: torch.cat([tensor, tensor], dim=1) for key, tensor in weights.items() if "lora_A" in key}
    save_file({**weights, **wider}, adapter / "adapter_model.safetensors")

    assert "does not fit" in refusal(tiny, adapter)


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
    tiny: TinyModels, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    assert words in refusal(tiny, copy_adapter(tiny, tmp_path, config))


def test_a_missing_base_is_refused_without_its_path(tiny: TinyModels, tmp_path: Path) -> None:
    gone = tiny.served("base").model_copy(update={"base_path": str(tmp_path / "gone")})

    with pytest.raises(ModelError, match="base model base cannot be loaded") as caught:
        LoadedModels(SETTINGS).load(gone, [])
    assert "gone" not in str(caught.value)


@pytest.fixture
def adapters_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters take host memory, as they do beside a device with memory of its own."""
    monkeypatch.setattr(adapters, "adapter_memory", lambda size, _: MemoryUse(host=size))


@pytest.mark.usefixtures("adapters_in_host_memory")
def test_adapters_of_a_base_on_a_gpu_take_the_hosts_memory(tiny: TinyModels) -> None:
    one, two, third = tiny.served("one", tiny.one), tiny.served("two", tiny.two), tiny.served("third", tiny.one)
    size = adapter_size(tiny)
    models = LoadedModels(settings_for(tiny, adapters=1).model_copy(update={"host_bytes": 2 * size}))
    models.load(tiny.served("base"), [])
    base = models.memory
    models.load(one, [])
    models.load(two, [])
    assert models.memory.device == base.device
    assert size < models.memory.host <= 2 * size

    models.forward([one])
    models.load(third, [])
    assert list(models._bases["base"].loaded) == ["one", "third"], "the least recently used one was evicted"
    with pytest.raises(OutOfMemory):
        models.load(tiny.served("fourth", tiny.one), [one, third])
    small = LoadedModels(settings_for(tiny, adapters=1).model_copy(update={"host_bytes": size // 2}))
    with pytest.raises(ModelError, match=r"adapter one takes the host's memory to .* GB; adapters may have"):
        small.load(one, [])


@pytest.mark.usefixtures("adapters_in_host_memory")
def test_adapters_that_free_no_device_memory_are_not_evicted(tiny: TinyModels) -> None:
    models = LoadedModels(settings_for(tiny, bases=2, adapters=1))
    models.load(tiny.served("one", tiny.one), [])
    models.load(tiny.served("second", base_digest="second"), [])
    with pytest.raises(OutOfMemory):
        models.load(
            tiny.served("third", base_digest="third"),
            [tiny.served("base"), tiny.served("s", base_digest="second")],
        )
    assert (models.num_bases, models.num_adapters) == (2, 1)


def test_slots_keep_to_the_budget(tiny: TinyModels) -> None:
    known = [tiny.served(str(n), tiny.two if n % 2 else tiny.one) for n in range(4)]
    models = LoadedModels(settings_for(tiny, adapters=4))
    for model in known:
        models.load(model, known)
    models.reserve_slots(known[0], [], [])
    with pytest.raises(OutOfMemory):
        models.reserve_slots(known[0], known[1:], known[1:])
    assert models.num_adapters == 4
    models.reserve_slots(known[0], known[1:2], known[1:2])  # idle adapters are evicted for it
    models.forward(known[:2])
    assert 2 <= models.num_adapters < 4
    assert not any(models._evictor.missing(MemoryUse(1)))


@pytest.mark.usefixtures("adapters_in_host_memory")
def test_an_adapter_with_a_slot_needs_no_more_device_memory(tiny: TinyModels) -> None:
    known = [tiny.served(str(n), tiny.one) for n in range(4)]
    spare = LoadedModels(SETTINGS)
    for model in known[:3]:
        spare.load(model, [])
    spare.reserve_slots(known[2], known[:2], known[:2])
    memory = spare.memory.device + 1
    models = LoadedModels(
        SETTINGS.model_copy(
            update={"memory_bytes": PROCESS_BYTES["cpu"] + memory + 2, "kv_bytes": 1, "prefix_cache_bytes": 1}
        )
    )
    for number, model in enumerate(known):
        models.load(model, known[:number])
        models.reserve_slots(model, known[:number], known[:number])
    assert models.memory.device < memory


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_that_does_not_fit_evicts_nothing(tiny: TinyModels, loaded: bool) -> None:
    """No size is counted twice among what might be evicted: an idle base includes its adapters."""
    third, *in_use = [tiny.served(str(n), tiny.one) for n in range(3)]
    idle = [tiny.served(f"idle{n}", tiny.one, base_digest="idle") for n in range(3)]
    size = adapter_size(tiny)
    outcomes = set()
    for cut in range(0, 24 * size, 2 * size):
        models = LoadedModels(SETTINGS)
        for model in [*in_use, *idle, *([third] if loaded else [])]:
            models.load(model, [])
        models.reserve_slots(in_use[0], in_use[1:], in_use)
        models._evictor.budget = models.memory.minus(MemoryUse(cut))
        for attempt in (models.load, partial(models.reserve_slots, running=in_use)):
            before = models.num_bases, models.num_adapters
            try:
                attempt(third, in_use=in_use)
            except OutOfMemory:
                assert (models.num_bases, models.num_adapters) == before
                outcomes.add("refused")
                break
        else:
            outcomes.add("fits")
    assert outcomes == {"refused", "fits"}


def test_slots_that_would_have_to_grow_are_not_free_memory(tiny: TinyModels) -> None:
    base, one, two = tiny.served("base"), tiny.served("one", tiny.one), tiny.served("two", tiny.two)
    models = LoadedModels(SETTINGS)
    models.load(two, [])
    models.reserve_slots(two, [base], [base])
    models.forward([two, base])
    slots = models._bases["base"].slots_memory.device
    models.load(one, [])
    models._bases["base"].evict_adapter("two")
    needed: list[int] = []
    models._bases["base"].reserve_slots(["one", None], lambda growth: needed.append(growth().device))
    models._bases["base"].reserve_slots([None], lambda _: None)
    models._evictor.budget = models.memory.plus(MemoryUse(needed[0] - slots // 2))
    assert min(needed[0], slots) > 0
    with pytest.raises(OutOfMemory):
        models.reserve_slots(one, [base], [base])


def test_slots_reserved_for_a_batch_stay_beside_a_batch_of_another_kind(tiny: TinyModels, tmp_path: Path) -> None:
    elsewhere = tiny.served("elsewhere", adapter(tiny.base, tmp_path / "dora", use_dora=True))
    one, two = tiny.served("one", tiny.one), tiny.served("two", tiny.two)
    models = LoadedModels(SETTINGS)
    for model in (one, two, elsewhere):
        models.load(model, [])
    before = models.memory
    models.reserve_slots(two, [one], [one])
    reserved = models.memory
    models.reserve_slots(elsewhere, [], [one, two])
    assert models.memory == reserved != before
    models.reserve_slots(one, [], [])
    assert models.memory == before


@pytest.mark.parametrize("gigabytes", [1, 64])
def test_the_budget_is_divided_whatever_its_size(gigabytes: int) -> None:
    room = gigabytes << 30
    settings = EngineSettings(memory_bytes=PROCESS_BYTES["cpu"] + room)
    live, prefixes, models = budget(settings, torch.device("cpu"))
    assert (live, prefixes, models.device) == (room // 4, room // 16, room - room // 4 - room // 16)
