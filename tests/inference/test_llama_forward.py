"""llama_forward gives the logits of transformers and PEFT, in prefill and in decode steps."""

import dataclasses
import gc
import random
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.inference.conftest import TinyModels
from tests.tiny import make_tiny_model
from worker.inference.cache.forward_batch import PrefillChunk
from worker.inference.cache.kv_cache import CPU, KVCache
from worker.inference.engine.model_runner import run_step
from worker.inference.engine.offline import decode, prefill
from worker.inference.ipc import EngineSettings
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.base import load_base
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, base_bytes, weights_in_memory
from worker.inference.model.transformers_forward import Forward, TransformersForward
from worker.inference.sampling_params import ServedModel
from worker.quantization import bitsandbytes_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
SETTINGS = EngineSettings(device="cpu", dtype="float32")
SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
FAMILY: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=12)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}
PROMPTS = [list(range(3, 40)), list(range(50, 110)), [7]]


def save(base: Path, model: Any) -> Path:
    make_tiny_model(base)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)  # norms and biases that differ, as trained ones do
    model.save_pretrained(base)
    return base


def adapter(base: Path, directory: Path, rank: int = 4, **config: Any) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def served(base: Path, adapter: Path | None = None, digest: str = "") -> ServedModel:
    return ServedModel(
        digest=digest or ("adapter" if adapter else "base"),
        base_digest="base",
        base_path=str(base),
        adapter_path=str(adapter) if adapter else None,
        max_model_len=256,
    )


def logits_of(models: LoadedModels, *rows: ServedModel) -> list[torch.Tensor]:
    """Logits after each prompt, and after each of three more tokens, decoded in one batch. Each row has its own model,
    or all rows have one."""
    return logits_by(models.forward, rows if len(rows) > 1 else rows * len(PROMPTS))


def logits_by(
    forward: Callable[[Sequence[Any]], Forward], answering: Sequence[Any], device: torch.device = CPU
) -> list[torch.Tensor]:
    """The same. `answering`: what `forward` takes, one for each row."""
    kv_cache = KVCache(2, device)
    kv_cache.reserve(len(PROMPTS), 100)
    found = [
        prefill(forward([model]), kv_cache, row, prompt)
        for row, (model, prompt) in enumerate(zip(answering, PROMPTS, strict=True))
    ]
    for step in range(3):
        lengths = [len(prompt) + step for prompt in PROMPTS]
        found += decode(forward(answering), kv_cache, [11 + step] * len(PROMPTS), lengths).unbind()
    return found


def reference_logits(model: Any) -> list[torch.Tensor]:
    """The same by transformers' own forward, without a KV cache."""
    longer = [[*prompt, *range(11, 11 + more)] for more in range(4) for prompt in PROMPTS]
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].float() for ids in longer]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("architecture", FAMILY)
def test_a_base_and_its_adapters_give_the_logits_of_transformers_and_peft(tmp_path: Path, architecture: str) -> None:
    base = save(tmp_path / "base", FAMILY[architecture]())
    chosen = {"all": "all-linear", "some": ["q_proj", "up_proj", "down_proj"]}
    made = {
        name: adapter(base, tmp_path / name, target_modules=modules, use_rslora=name == "some")
        for name, modules in chosen.items()
    }
    models = LoadedModels(SETTINGS)
    wanted = {"base": reference_logits(AutoModelForCausalLM.from_pretrained(base))}
    for name, directory in made.items():
        wanted[name] = reference_logits(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
        )
    known = {name: served(base, made.get(name), name) for name in ("base", "all", "some")}
    for name in ("base", "all", "some", "base"):
        models.load(known[name], [])
        assert not isinstance(models.forward([known[name]]), TransformersForward)
        assert_same(logits_of(models, known[name]), wanted[name])
    for mixed in (("all", "some", "base"), ("some", "all", "some"), ("base", "base", "all"), ("all", "base", "some")):
        assert len({models.batch_key(known[name]) for name in mixed}) == 1
        found = logits_of(models, *(known[name] for name in mixed))
        rows = [mixed[index % len(PROMPTS)] for index in range(len(found))]
        assert_same(found, [wanted[name][index] for index, name in enumerate(rows)])


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_share_a_batch_over_a_base_that_stays_quantised(tmp_path: Path, bits: int) -> None:
    """As on a GPU, with bitsandbytes' CPU kernels."""
    base = save(tmp_path / "base", FAMILY["llama"]())
    plain = load_base(served(base), CPU, torch.float32)
    quantised = AdaptedBase(dataclasses.replace(plain, model=packed(base, bits)))
    wanted = {"base": reference_logits(packed(base, bits))}
    for name, modules in {"all": "all-linear", "some": ["q_proj", "up_proj", "down_proj"]}.items():
        directory = adapter(base, tmp_path / name, target_modules=modules)
        quantised.load(name, directory, max_rank=8)
        assert quantised.can_share_batch(name)
        wanted[name] = reference_logits(PeftModel.from_pretrained(packed(base, bits), directory).train())
    exact = reference_logits(AutoModelForCausalLM.from_pretrained(base))

    for mixed in (("base",) * 3, ("all",) * 3, ("all", "some", "base"), ("some", "base", "all")):
        rows = [None if name == "base" else name for name in mixed]
        found = logits_by(quantised.forward, rows)
        assert_same(found, [wanted[mixed[index % len(PROMPTS)]][index] for index in range(len(found))])
    off = max(float((one - other).abs().max()) for one, other in zip(wanted["base"], exact, strict=True))
    assert off > 0.01  # quantisation makes a difference here


def packed(base: Path, bits: int) -> Any:
    """A base whose layers keep quantised weights. In eval mode bitsandbytes would repack them for a CPU."""
    held = bitsandbytes_config(bits, "nf4", double_quant=True, compute=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=held)
    return model.train().requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_memory_of_a_quantised_base_is_known_before_it_is_loaded(tmp_path: Path, bits: int) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    asked = served(base).model_copy(update={"quantization": {"bits": bits}})
    known = base_bytes(asked, torch.device("cuda"), torch.float32)
    assert known == pytest.approx(weights_in_memory(packed(base, bits)), rel=0.1)


@pytest.mark.parametrize("stock", [False, True])
def test_a_prefill_chunk_gives_as_many_logits_as_it_asks_for(tmp_path: Path, stock: bool) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    models = LoadedModels(SETTINGS)
    model: Any = models.load(served(base), []).model
    with torch.inference_mode():
        whole = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ([5, 6, 7, 8], [9, 10, 11], [12, 13])]
    forward = TransformersForward(model) if stock else models.forward([served(base)])
    kv_cache = KVCache(2)
    kv_cache.reserve(4, 8)
    prefill(forward, kv_cache, 0, [5, 6, 7])

    chunks = [
        PrefillChunk(1, [9, 10, 11], 0, num_logits=2),
        PrefillChunk(2, [12, 13], 0, num_logits=0),
        PrefillChunk(3, [5, 6, 7, 8], 0, num_logits=4),
    ]
    found = run_step(forward, kv_cache, [8], [3], chunks)

    torch.testing.assert_close(found, torch.cat([whole[0][3:], whole[1][1:], whole[0]]), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    models = LoadedModels(SETTINGS.model_copy(update={"dtype": "bfloat16"}))
    models.load(served(base), [])
    exact = reference_logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    stock = reference_logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    off = [float((one - other).norm() / other.norm()) for one, other in zip(stock, exact, strict=True)]
    mine = [
        float((one - other).norm() / other.norm())
        for one, other in zip(logits_of(models, served(base)), exact, strict=True)
    ]
    assert max(mine) < 2 * max(off)
    assert sum(mine) < 1.5 * sum(off)


def test_an_adapter_of_other_layers_runs_in_transformers_forward(tmp_path: Path) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    directory = adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    models = LoadedModels(SETTINGS)
    model = served(base, directory)
    models.load(model, [])
    assert isinstance(models.forward([model]), TransformersForward)
    assert models.batch_key(model) != models.batch_key(served(base))
    assert_same(
        logits_of(models, model),
        reference_logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)),
    )


def test_an_adapter_of_the_embeddings_does_not_change_the_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    directory = adapter(base, tmp_path / "embedded", target_modules=["embed_tokens", "q_proj"])
    models, bare, model = LoadedModels(SETTINGS), served(base), served(base, directory)
    models.load(bare, [])
    before = logits_of(models, bare)
    models.load(model, [])
    assert float((logits_of(models, model)[0] - before[0]).abs().max()) > 0.1
    assert_same(logits_of(models, bare), before)


def test_an_evicted_base_frees_its_memory(tiny: TinyModels) -> None:
    size = base_bytes(tiny.served("first"), torch.device("cpu"), torch.float32)
    models = LoadedModels(
        SETTINGS.model_copy(
            update={"memory_bytes": PROCESS_BYTES["cpu"] + size + 2, "kv_bytes": 1, "prefix_cache_bytes": 1}
        )
    )
    first = weakref.ref(models.load(tiny.served("first", base_digest="first"), []).model)
    models.load(tiny.served("second", base_digest="second"), [])
    gc.collect()
    assert first() is None


def make_adapters(base: Path, directory: Path, count: int) -> dict[str, ServedModel]:
    """Adapters of different ranks and of different layers."""
    chosen = ["all-linear", ["q_proj", "down_proj"], ["v_proj"], ["gate_proj", "o_proj", "k_proj"]]
    made = {}
    for number in range(count):
        torch.manual_seed(number)
        name, rank = f"a{number}", 1 + 3 * number % 8
        path = adapter(base, directory / name, rank, target_modules=chosen[number % len(chosen)])
        made[name] = served(base, path, name)
    return made


def test_adapters_are_exchanged_in_slots(tmp_path: Path) -> None:
    """Each row is computed with its own adapter, whatever slots earlier batches used."""
    base = save(tmp_path / "base", FAMILY["llama"]())
    known = make_adapters(base, tmp_path, 9) | {"base": served(base)}
    models = LoadedModels(SETTINGS)
    for model in known.values():
        models.load(model, [])
    wanted = {name: logits_of(models, model) for name, model in known.items()}
    draw = random.Random(3)
    for _ in range(40):
        rows = [draw.choice(list(known)) for _ in PROMPTS]
        found = logits_of(models, *(known[name] for name in rows))
        assert_same(found, [wanted[rows[index % len(PROMPTS)]][index] for index in range(len(found))])
