"""Batch invariance: at temperature 0 a completion has the same bits alone, in any batch, and from the prefix cache.

Matrix products and attention have real models' shapes, and run through the scheduler."""

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
    """Save a base whose weights are large enough for rounding errors to show."""
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
    """Prompts of lengths at which kernels change their algorithm, for all models in turn."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 400) for _ in range(length)] for length in LENGTHS]
    return [(served[index % len(served)], prompt) for index, prompt in enumerate(prompts)]


def complete(
    requests: Requests, *, at_once: int, rounds: int = 1, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> list[list[Finished]]:
    """The results of each round. Rounds send the same requests to one scheduler. Two rounds share a prefix cache."""
    cache_bytes = 0 if rounds == 1 else 1 << 30
    settings = EngineSettings(device="cpu", dtype=dtype, max_batch=at_once, prefix_cache_bytes=cache_bytes)
    outputs: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(settings), settings, outputs.append)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=3)
    for number in range(rounds):
        for index, (model, prompt) in enumerate(requests):
            request_id = f"{number}/{index:02}"
            scheduler.add(Generate(id=request_id, model=model, prompt=prompt, sampling=sampling))
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
    found = sorted((message for message in outputs if isinstance(message, Finished)), key=lambda answer: answer.id)
    assert len(found) == rounds * len(requests)
    return [found[start : start + len(requests)] for start in range(0, len(found), len(requests))]


def exact(results: Sequence[Finished], start: int = 0, end: int = TOKENS) -> list[Any]:
    """Token ids and log-probabilities, exact."""
    return [(answer.token_ids[start:end], (answer.logprobs or [])[start:end]) for answer in results]


@to_the_bit
def test_the_batch_changes_no_bit(requests: Requests) -> None:
    (alone,) = complete(requests, at_once=1)
    for at_once in (2, 5, 16):
        (together,) = complete(requests, at_once=at_once)
        assert exact(together) == exact(alone), at_once


@to_the_bit
def test_the_prefix_cache_changes_no_bit(requests: Requests) -> None:
    (fresh,) = complete(requests, at_once=16)
    first, again = complete(requests, at_once=16, rounds=2)
    assert sum(answer.cached_tokens for answer in again) > 0.9 * sum(LENGTHS)
    assert exact(first) == exact(fresh)
    assert exact(again) == exact(fresh)


class CancellingModel:
    """A model over keys and values that cancel but for their last bits. Another order of summation shows in one row of
    ten; with real text it shows in one completion of twenty."""

    def __init__(self, model: Any) -> None:
        self._config = model.config
        forward = build_llama_forward(model.to(torch.bfloat16).eval())
        assert forward is not None
        self._forward = forward

    def make_prefix(self, length: int) -> Snapshot:
        """Keys and values of each layer: pairs with the same key and nearly opposite values."""
        config = self._config
        shape = config.num_key_value_heads, length // 2, 1, config.hidden_size // config.num_attention_heads

        def layer() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = torch.randn(shape), 256 * torch.randn(shape)
            opposite = -values * (1 + 2**-8 * torch.randn(shape))
            both = torch.cat([keys, keys], 2), torch.cat([values, opposite], 2)
            return both[0].flatten(1, 2).bfloat16(), both[1].flatten(1, 2).bfloat16()

        return [layer() for _ in range(config.num_hidden_layers)]

    def decode_rows(self, rows: Sequence[Snapshot], lengths: list[int]) -> torch.Tensor:
        """Decode one token of each row. Returns logits [num_rows, vocab]."""
        return decode(self._forward, self._kv_cache(rows, lengths), [5] * len(rows), lengths)

    def prefill(self, row: Snapshot, start: int, ids: list[int], ends: Sequence[int]) -> torch.Tensor:
        """Prefill `ids` in chunks that end at `ends`. Returns the last logits, [1, vocab]."""
        kv_cache, logits = self._kv_cache([row], [start]), torch.empty(0)
        for begin, end in itertools.pairwise([0, *ends]):
            logits = run_step(self._forward, kv_cache, (), (), [PrefillChunk(0, ids[begin:end], start + begin, 1)])
        return logits

    def decode_ids(self, row: Snapshot, start: int, ids: list[int]) -> torch.Tensor:
        """Decode `ids` one by one. Returns the last logits, [1, vocab]."""
        kv_cache, logits = self._kv_cache([row], [start]), torch.empty(0)
        for index, token in enumerate(ids):
            logits = decode(self._forward, kv_cache, [token], [start + index])
        return logits

    def _kv_cache(self, rows: Sequence[Snapshot], lengths: list[int]) -> KVCache:
        kv_cache = KVCache(len(rows[0]))
        kv_cache.reserve(len(rows), max(lengths) + 64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            kv_cache.restore(number, row, length)
        return kv_cache


@pytest.fixture(scope="module", params=SHAPES)
def cancelling(request: pytest.FixtureRequest) -> CancellingModel:
    torch.manual_seed(7)
    return CancellingModel(SHAPES[request.param]())


@to_the_bit
def test_the_batch_changes_no_bit_of_sums_that_nearly_cancel(cancelling: CancellingModel) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 350, (16,)).mul(2).tolist()
        rows = [cancelling.make_prefix(length) for length in lengths]
        together = cancelling.decode_rows(rows, lengths)
        for row, length in enumerate(lengths):
            alone = cancelling.decode_rows([rows[row]], [length])
            assert torch.equal(alone[0], together[row]), (length, max(lengths))


@to_the_bit
def test_chunks_change_no_bit_of_sums_that_nearly_cancel(cancelling: CancellingModel) -> None:
    ids = list(range(3, 53))
    for length in range(2, 720, 36):
        row = cancelling.make_prefix(length)
        at_once = cancelling.prefill(row, length, ids, [50])
        for ends in ((49, 50), (48, 50), (47, 50), (46, 50), (1, 3, 6, 31, 50)):
            assert torch.equal(cancelling.prefill(row, length, ids, ends), at_once), (length, ends)
        assert torch.equal(cancelling.decode_ids(row, length, ids), at_once), length


def test_in_float32_answers_part_only_at_a_near_tie(requests: Requests) -> None:
    (alone,) = complete(requests, at_once=1, dtype="float32")
    (together,) = complete(requests, at_once=16, dtype="float32")
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if mine.chosen.id != theirs.chosen.id:
                assert mine.top[0].logprob - mine.top[1].logprob < TOLERANCE
                break
            assert mine.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=TOLERANCE)
