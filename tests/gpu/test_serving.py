"""Serving on a GPU: bases stay quantised, adapters mix over them, and the function is the one that PEFT computes."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.inference.conftest import NF4, Server, serving
from tests.inference.test_llama_forward import FAMILY, PROMPTS, adapter, logits_by, save, served
from tests.tiny import make_tiny_adapter, make_tiny_model
from worker.inference.ipc import EngineSettings
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import base_bytes
from worker.inference.model.transformers_forward import TransformersForward
from worker.inference.server.completion_service import ServerSettings
from worker.quantization import bitsandbytes_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks by the old name
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),  # that products of 8 bits are in float16
]
HELD: dict[str, dict[str, Any] | None] = {"plain": None, "nf4": NF4, "int8": {"bits": 8}}
NEAR_TIE = 0.1
"""Log-probabilities that float16 may exchange."""
NAMES = ("all", "some", "base")


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_mix_over_any_base(
    gpu: torch.device, tmp_path: Path, held: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No further from float32 than PEFT in the same number format, up to twice; the third step is a replayed one."""
    base = save(tmp_path / "base", FAMILY["llama"]())
    made = {
        "all": adapter(base, tmp_path / "all", target_modules="all-linear"),
        "some": adapter(base, tmp_path / "some", rank=2, target_modules=["q_proj", "up_proj", "down_proj"]),
    }
    exact = {name: whole(base, made.get(name), HELD[held], torch.float32) for name in NAMES}
    stock = {name: whole(base, made.get(name), HELD[held], getattr(torch, dtype)) for name in NAMES}
    off = max(distance(one, other) for name in NAMES for one, other in zip(stock[name], exact[name], strict=True))

    models = LoadedModels(EngineSettings.model_validate({"device": "cuda", "dtype": dtype}))
    known = {name: served(base, made.get(name), name).model_copy(update={"quantization": HELD[held]}) for name in NAMES}
    for model in known.values():
        models.load(model, [])
        assert not isinstance(models.forward([model]), TransformersForward)
    for mixed in (("base",) * 3, ("all",) * 3, ("all", "some", "base"), ("some", "base", "all")):
        found = logits_by(models.forward, [known[name] for name in mixed], gpu)
        for place, logits in enumerate(found):
            name = mixed[place % len(PROMPTS)]
            assert distance(logits, exact[name][place]) < 2 * off + 1e-3, (mixed, place, off)
    assert "could not be captured" not in caplog.text


def whole(base: Path, adapter: Path | None, held: dict[str, Any] | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """Behind the same tokens as `logits_by`, by transformers and PEFT without any store."""
    config = held and bitsandbytes_config(held["bits"], "nf4", double_quant=True, compute=dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=config, device_map={"": torch.device("cuda")}
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    model.eval()
    longer = [[*prompt, *range(11, 11 + more)] for more in range(4) for prompt in PROMPTS]
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids], device="cuda")).logits[0, -1].float() for ids in longer]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """As a share of the other's length."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("held", ["nf4", "int8", "plain"])
def test_what_a_base_takes_is_known_before_it_is_loaded(gpu: torch.device, tmp_path: Path, held: str) -> None:
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    base = save(tmp_path / "base", LlamaForCausalLM(LlamaConfig(vocab_size=8_192, num_attention_heads=8, **shape)))
    model = served(base).model_copy(update={"quantization": HELD[held]})
    models = LoadedModels(EngineSettings(device="cuda", dtype="float16"))
    gc.collect()  # what earlier tests left
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    models.load(model, [])
    taken = torch.cuda.memory_allocated() - before
    assert 0.95 * taken <= base_bytes(model, gpu, torch.float16) <= 1.2 * taken
    assert models.memory.device == pytest.approx(taken, rel=0.05)


def test_a_crowd_over_an_nf4_base_is_answered(tmp_path: Path) -> None:
    """As on the card: float16, the engine in a process of its own, three models at once."""
    base = make_tiny_model(tmp_path / "base")
    made = {name: make_tiny_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    over_nf4 = {
        name: served(base, made.get(name), name).model_copy(update={"quantization": NF4})
        for name in ("base", "one", "two")
    }
    settings = ServerSettings(engine=EngineSettings(device="cuda", dtype="float16"))
    with serving(over_nf4, settings) as server:
        server.wait_until_ready()
        fixed = {name: answer(server, name, deterministic=True) for name in over_nf4}
        with ThreadPoolExecutor(24) as pool:
            asked = [name for _ in range(8) for name in over_nf4]
            crowd = list(pool.map(lambda name: answer(server, name), asked))
            fixed_in_company = list(pool.map(lambda name: answer(server, name, deterministic=True), asked))
    assert len({tuple(found.ids) for found in fixed.values()}) == len(over_nf4)
    assert all(found.ids == fixed[name].ids for name, found in zip(asked, fixed_in_company, strict=True))
    margins = [
        margin for name, found in zip(asked, crowd, strict=True) if (margin := fixed[name].apart(found)) is not None
    ]
    assert max(margins, default=0.0) < NEAR_TIE, margins


class Answer(NamedTuple):
    """Token ids, and how far the two most probable ones were apart at each."""

    ids: list[int]
    margins: list[float]

    def apart(self, other: "Answer") -> float | None:
        """The margin where the other first says something else: sums in another order may turn a near tie."""
        differ = (place for place, (one, two) in enumerate(zip(self.ids, other.ids, strict=True)) if one != two)
        place = next(differ, None)
        return None if place is None else self.margins[place]


def answer(server: Server, model: str, **more: Any) -> Answer:
    choice = server.choice(
        model=model, max_tokens=12, ignore_eos=True, logprobs=2, return_tokens_as_token_ids=True, **more
    )
    tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    return Answer(choice["token_ids"], [top[0] - top[1] for top in tops])
