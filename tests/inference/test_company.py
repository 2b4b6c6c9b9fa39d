"""An answer at temperature 0 is the same to the bit alone, in any company, and from any cache: the products and the
attention of real models' shapes, through the scheduler."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import make_tiny_model
from worker.inference.models import Models
from worker.inference.protocol import Sampling, ServedModel
from worker.inference.scheduler import Scheduler
from worker.inference.wire import EngineSettings, Finished, Generate, ToFront
from worker.processor import cpu_here

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
CPU = cpu_here()
to_the_bit = pytest.mark.skipif(
    CPU.vendor != "AuthenticAMD" or not CPU.fast_bf16, reason="the bits of other processors' kernels were not looked at"
)
COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1_024,
    "eos_token_id": 1,
}
SHAPES: dict[str, Any] = {
    "SmolLM2-135M": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, hidden_size=576, intermediate_size=1_536, num_attention_heads=9, num_key_value_heads=3)
    ),
    "Qwen2-0.5B": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, hidden_size=896, intermediate_size=4_864, num_attention_heads=14, num_key_value_heads=2)
    ),
}
LENGTHS = (1, 3, 30, 63, 130, 190, 194, 225, 256, 300, 383, 511, 513, 740)
RANKS = (None, 8, 4, 24)  # None: the base
TOKENS = 6
TOLERANCE = 1e-3
"""Of log-probabilities in float32, on any processor."""


def save(base: Path, model: Any) -> Path:
    """A base whose numbers are large enough to be rounded differently wherever they can be."""
    make_tiny_model(base)
    torch.manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    model.save_pretrained(base)
    return base


def adapter(base: Path, directory: Path, rank: int) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


@pytest.fixture(scope="module", params=SHAPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """A base, and adapters over it."""
    folder = tmp_path_factory.mktemp("shapes")
    base = save(folder / "base", SHAPES[request.param]())
    return [
        ServedModel(
            digest=f"rank {rank}",
            base_digest="base",
            base_path=str(base),
            adapter_path=str(adapter(base, folder / str(rank), rank)) if rank else None,
            max_model_len=1_024,
        )
        for rank in RANKS
    ]


Requests = list[tuple[ServedModel, list[int]]]


@pytest.fixture
def requests(served: list[ServedModel]) -> Requests:
    """Prompts of lengths at which kernels change their ways, by all models in turn."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 400) for _ in range(length)] for length in LENGTHS]
    return [(served[place % len(served)], prompt) for place, prompt in enumerate(prompts)]


def answers(
    requests: Requests, *, at_once: int, rounds: int = 1, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> list[list[Finished]]:
    """Of each round, in which one engine is asked the same again, with what it remembers."""
    memory = 0 if rounds == 1 else 1 << 30
    settings = EngineSettings(device="cpu", dtype=dtype, max_batch=at_once, prefix_cache_bytes=memory)
    said: list[ToFront] = []
    scheduler = Scheduler(Models(settings), settings, said.append)
    sampling = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=3)
    for number in range(rounds):
        for place, (model, prompt) in enumerate(requests):
            request_id = f"{number}/{place:02}"
            scheduler.add(Generate(id=request_id, model=model, prompt=prompt, sampling=sampling))
        while scheduler.busy or scheduler.reading:
            scheduler.turn()
    found = sorted((message for message in said if isinstance(message, Finished)), key=lambda answer: answer.id)
    assert len(found) == rounds * len(requests)
    return [found[start : start + len(requests)] for start in range(0, len(found), len(requests))]


def heard(answers: Sequence[Finished], start: int = 0, end: int = TOKENS) -> list[Any]:
    """What a client sees of them: tokens, and log-probabilities to the last digit."""
    return [(answer.token_ids[start:end], (answer.logprobs or [])[start:end]) for answer in answers]


@to_the_bit
def test_company_changes_no_bit(requests: Requests) -> None:
    (alone,) = answers(requests, at_once=1)
    for at_once in (2, 5, 16):
        (together,) = answers(requests, at_once=at_once)
        assert heard(together) == heard(alone), at_once


@to_the_bit
def test_what_is_remembered_changes_no_bit(requests: Requests) -> None:
    (fresh,) = answers(requests, at_once=16)
    first, again = answers(requests, at_once=16, rounds=2)
    assert sum(answer.cached_tokens for answer in again) > 0.9 * sum(LENGTHS)
    assert heard(first) == heard(fresh)
    assert heard(again) == heard(fresh)


def test_in_float32_answers_part_only_at_a_near_tie(requests: Requests) -> None:
    (alone,) = answers(requests, at_once=1, dtype="float32")
    (together,) = answers(requests, at_once=16, dtype="float32")
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if mine.chosen.id != theirs.chosen.id:
                assert mine.top[0].logprob - mine.top[1].logprob < TOLERANCE
                break
            assert mine.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=TOLERANCE)
