"""An answer at temperature 0 is the same to the bit alone, in any company, and from any cache: the products and the
attention of real models' shapes, through the scheduler."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import make_tiny_model
from worker.inference.cache.forward_batch import PrefillChunk
from worker.inference.cache.kv_cache import KVCache, Snapshot
from worker.inference.engine.model_runner import run_step
from worker.inference.engine.offline import decode
from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import EngineOutput, EngineSettings, Finished, Generate
from worker.inference.model.batch_invariance import is_batch_invariant
from worker.inference.model.llama_forward import build_llama_forward
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import SamplingParams, ServedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
to_the_bit = pytest.mark.skipif(
    not is_batch_invariant(torch.device("cpu"), torch.bfloat16), reason="this processor's kernels fail the self-check"
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
    said: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(settings), settings, said.append)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=3)
    for number in range(rounds):
        for place, (model, prompt) in enumerate(requests):
            request_id = f"{number}/{place:02}"
            scheduler.add(Generate(id=request_id, model=model, prompt=prompt, sampling=sampling))
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
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


class Cancelling:
    """A model beside keys and values that cancel but for their last bits: an order of summing shows in one row of ten
    that text would show in one answer of twenty."""

    def __init__(self, model: Any) -> None:
        self._config = model.config
        forward = build_llama_forward(model.to(torch.bfloat16).eval())
        assert forward is not None
        self._forward = forward

    def remembered(self, length: int) -> Snapshot:
        """Of each layer, two by two with the same key and nearly opposite values."""
        config = self._config
        shape = config.num_key_value_heads, length // 2, 1, config.hidden_size // config.num_attention_heads

        def layer() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = torch.randn(shape), 256 * torch.randn(shape)
            opposite = -values * (1 + 2**-8 * torch.randn(shape))
            both = torch.cat([keys, keys], 2), torch.cat([values, opposite], 2)
            return both[0].flatten(1, 2).bfloat16(), both[1].flatten(1, 2).bfloat16()

        return [layer() for _ in range(config.num_hidden_layers)]

    def answered(self, rows: Sequence[Snapshot], lengths: list[int]) -> torch.Tensor:
        """The logits behind one more token of each row, [rows, V]."""
        return decode(self._forward, self._store(rows, lengths), [5] * len(rows), lengths)

    def read(self, row: Snapshot, start: int, ids: list[int], ends: Sequence[int]) -> torch.Tensor:
        """The logits behind the last of `ids`, read in as many steps as `ends` has numbers, [1, V]."""
        store, logits = self._store([row], [start]), torch.empty(0)
        for begin, end in itertools.pairwise([0, *ends]):
            logits = run_step(self._forward, store, (), (), [PrefillChunk(0, ids[begin:end], start + begin, 1)])
        return logits

    def written(self, row: Snapshot, start: int, ids: list[int]) -> torch.Tensor:
        """The same where `ids` were not read but written, one after the other."""
        store, logits = self._store([row], [start]), torch.empty(0)
        for place, token in enumerate(ids):
            logits = decode(self._forward, store, [token], [start + place])
        return logits

    def _store(self, rows: Sequence[Snapshot], lengths: list[int]) -> KVCache:
        store = KVCache(len(rows[0]))
        store.reserve(len(rows), max(lengths) + 64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            store.restore(number, row, length)
        return store


@pytest.fixture(scope="module", params=SHAPES)
def cancelling(request: pytest.FixtureRequest) -> Cancelling:
    torch.manual_seed(7)
    return Cancelling(SHAPES[request.param]())


@to_the_bit
def test_company_changes_no_bit_of_what_nearly_cancels(cancelling: Cancelling) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 350, (16,)).mul(2).tolist()
        rows = [cancelling.remembered(length) for length in lengths]
        together = cancelling.answered(rows, lengths)
        for row, length in enumerate(lengths):
            alone = cancelling.answered([rows[row]], [length])
            assert torch.equal(alone[0], together[row]), (length, max(lengths))


@to_the_bit
def test_how_tokens_came_there_changes_no_bit_of_what_nearly_cancels(cancelling: Cancelling) -> None:
    ids = list(range(3, 53))
    for length in range(2, 720, 36):
        row = cancelling.remembered(length)
        at_once = cancelling.read(row, length, ids, [50])
        for ends in ((49, 50), (48, 50), (47, 50), (46, 50), (1, 3, 6, 31, 50)):
            assert torch.equal(cancelling.read(row, length, ids, ends), at_once), (length, ends)
        assert torch.equal(cancelling.written(row, length, ids), at_once), length


def test_in_float32_answers_part_only_at_a_near_tie(requests: Requests) -> None:
    (alone,) = answers(requests, at_once=1, dtype="float32")
    (together,) = answers(requests, at_once=16, dtype="float32")
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if mine.chosen.id != theirs.chosen.id:
                assert mine.top[0].logprob - mine.top[1].logprob < TOLERANCE
                break
            assert mine.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=TOLERANCE)
