"""The scheduler without processes: batches, KV cache rows, the prefix cache, and the detokenizer."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.inference.conftest import TinyModels
from worker.inference.cache import kv_cache as kv
from worker.inference.cache.forward_batch import decode_segment
from worker.inference.cache.kv_cache import KVCache, Snapshot
from worker.inference.cache.prefix_cache import PrefixCache
from worker.inference.engine import scheduler
from worker.inference.engine.detokenizer import AnswerText, Detokenizer
from worker.inference.engine.scheduler import Scheduler
from worker.inference.engine.sequence import Sequence
from worker.inference.ipc import EngineOutput, EngineSettings, Failed, Finished, Generate
from worker.inference.model.base import Base
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, MemoryUse, base_bytes, weights_bytes
from worker.inference.sampling_params import SamplingParams, ServedModel


class SchedulerHarness:
    """A scheduler, its models, and the messages that it sent."""

    def __init__(self, models_type: type[LoadedModels] = LoadedModels, **settings: int) -> None:
        given = EngineSettings.model_validate({"device": "cpu", "dtype": "float32", **settings})
        self.outputs: list[EngineOutput] = []
        self.models = models_type(given)
        self.scheduler = Scheduler(self.models, given, self.outputs.append)

    def add_and_load(self, request_id: str, model: ServedModel, tokens: int = 6, prompt: int = 4) -> None:
        """Queue a request, and wait until its base is loaded."""
        self.add(request_id, model, tokens, prompt)
        while self.scheduler.is_loading:
            self.scheduler.finish_loads()

    def add(self, request_id: str, model: ServedModel, tokens: int = 6, prompt: int = 4, **more: Any) -> None:
        """Queue a request. `more`: further sampling parameters."""
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **more)
        self.scheduler.add(Generate(id=request_id, model=model, prompt=list(range(3, 3 + prompt)), sampling=sampling))

    def run(self) -> None:
        """Step until no request is left."""
        while self.scheduler.has_work or self.scheduler.is_loading:
            self.scheduler.step()

    @property
    def finished(self) -> list[str]:
        """The ids of finished requests, in order."""
        return list(self.completions)

    @property
    def completions(self) -> dict[str, list[int]]:
        """Their token ids, in the same order."""
        return {message.id: message.token_ids for message in self.outputs if isinstance(message, Finished)}


def test_many_requests_for_one_adapter_do_not_starve_another(tiny: TinyModels) -> None:
    harness = SchedulerHarness(max_batch=2, slice_steps=4)
    for i in range(12):
        harness.add_and_load(f"many{i}", tiny.served("one", tiny.one))
    for _ in range(5):
        harness.scheduler.step()
    harness.add_and_load("single", tiny.served("two", tiny.two))

    harness.run()

    assert len(harness.finished) == 13
    assert harness.finished.index("single") <= 4


def test_deterministic_requests_take_turns_with_the_others(tiny: TinyModels) -> None:
    harness = SchedulerHarness(max_batch=4, slice_steps=4)
    for i in range(12):
        harness.add(f"many{i}", tiny.served("one", tiny.one), deterministic=True)
    while harness.scheduler.is_loading:
        harness.scheduler.finish_loads()
    harness.add_and_load("single", tiny.served("two", tiny.two))
    harness.add("deterministic", tiny.served("two", tiny.two), deterministic=True)

    harness.run()

    assert len(harness.finished) == 14
    assert harness.finished.index("single") <= 3
    assert harness.finished.index("deterministic") <= 3


@pytest.fixture
def overflowing(tiny: TinyModels, tmp_path: Path) -> ServedModel:
    """An adapter whose activations overflow."""
    copy = Path(shutil.copytree(tiny.one, tmp_path / "overflowing"))
    weights = load_file(copy / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(value, 1e30) for name, value in weights.items()}, copy / "adapter_model.safetensors"
    )
    return tiny.served("overflowing", copy)


@pytest.fixture
def clean_completion(tiny: TinyModels) -> list[int]:
    """The completion of the base in clean rows."""
    harness = SchedulerHarness()
    harness.add_and_load("next", tiny.served("base"))
    harness.run()
    return harness.completions["next"]


def failures(harness: SchedulerHarness) -> list[tuple[str, int]]:
    return [(failed.id, failed.status) for failed in harness.outputs if isinstance(failed, Failed)]


def test_a_row_that_overflowed_is_zeroed_for_the_next_sequence(
    tiny: TinyModels, overflowing: ServedModel, clean_completion: list[int]
) -> None:
    harness = SchedulerHarness()
    harness.add_and_load("neighbour", tiny.served("base"), tokens=60)
    harness.add_and_load("overflowing", overflowing, prompt=30)
    for _ in range(3):
        harness.scheduler.step()
    assert failures(harness) == [("overflowing", 500)]

    harness.add_and_load("next", tiny.served("base"))
    harness.run()

    assert harness.completions["next"] == clean_completion
    assert len(harness.completions["neighbour"]) == 60


def test_a_row_that_overflowed_in_prefill_is_zeroed_when_its_request_is_cancelled(
    tiny: TinyModels, overflowing: ServedModel, clean_completion: list[int]
) -> None:
    harness = SchedulerHarness(prefix_cache_bytes=0)
    harness.add_and_load("neighbour", tiny.served("base"), tokens=60)
    harness.add_and_load("overflowing", overflowing, prompt=300)
    harness.scheduler.step()
    assert [sequence.id for batch in harness.scheduler._batches.values() for sequence in batch.prefilling] == [
        "overflowing"
    ]

    harness.scheduler.cancel("overflowing")
    harness.add_and_load("next", tiny.served("base"))
    harness.run()

    assert harness.completions["next"] == clean_completion
    assert failures(harness) == []


def test_a_row_that_overflowed_in_prefill_is_zeroed_when_its_sequence_moves(
    tiny: TinyModels, overflowing: ServedModel, clean_completion: list[int]
) -> None:
    harness = SchedulerHarness(prefix_cache_bytes=0)
    harness.add_and_load("short", tiny.served("base"), tokens=1)
    harness.add_and_load("neighbour", tiny.served("base"), tokens=60)
    harness.add_and_load("overflowing", overflowing, prompt=300)
    while not failures(harness):
        harness.scheduler.step()

    harness.add_and_load("next", tiny.served("base"))
    harness.add_and_load("after", tiny.served("base"))
    harness.run()

    assert failures(harness) == [("overflowing", 500)]
    assert harness.completions["next"] == harness.completions["after"] == clean_completion


def test_prompt_logprobs_that_are_not_finite_fail_only_their_request(
    tiny: TinyModels, overflowing: ServedModel
) -> None:
    harness = SchedulerHarness()
    harness.add_and_load("neighbour", tiny.served("base"), tokens=9)
    harness.add("scored", overflowing, prompt_logprobs=2)
    harness.run()
    assert failures(harness) == [("scored", 500)]
    assert len(harness.completions["neighbour"]) == 9


def test_an_unexpected_error_of_one_sequence_fails_no_other(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Sequence.sample_next

    def faulty(sequence: Sequence, logits: torch.Tensor) -> None:
        if sequence.id == "odd":
            raise RuntimeError("unexpected")
        advance(sequence, logits)

    monkeypatch.setattr(Sequence, "sample_next", faulty)
    harness = SchedulerHarness()
    for name in ("one", "odd", "other"):
        harness.add_and_load(name, tiny.served("base"))
    harness.run()
    assert failures(harness) == [("odd", 500)]
    assert sorted(harness.finished) == ["one", "other"]


def test_prefix_cache_hits_are_of_one_base_and_counted(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    for number, digest in enumerate(("base", "base", "other")):
        harness.add_and_load(str(number), tiny.served("same", tiny.one, base_digest=digest), prompt=40)
        harness.run()
    cached = [message.cached_tokens for message in harness.outputs if isinstance(message, Finished)]
    assert cached == [0, 39, 0]
    assert (harness.scheduler.stats.prefix_hits, harness.scheduler.stats.prefix_queries) == (39, 120)


def test_a_long_completion_does_not_delay_another_adapters_short_one(tiny: TinyModels) -> None:
    harness = SchedulerHarness(max_batch=4, slice_steps=4)
    harness.add_and_load("long", tiny.served("one", tiny.one), tokens=200)
    harness.scheduler.step()
    harness.add_and_load("short", tiny.served("two", tiny.two), tokens=3)

    harness.run()

    assert harness.finished == ["short", "long"]


def test_sequences_of_one_model_share_their_decode_steps(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    for i in range(8):
        harness.add_and_load(f"r{i}", tiny.served("base"), tokens=10, prompt=4 + i)

    harness.run()

    assert harness.scheduler.stats.decode_steps == 9
    assert harness.scheduler.stats.generation_tokens == 80


def test_adapters_over_one_base_share_their_decode_steps(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    for i in range(8):
        model = (
            tiny.served("base"),
            tiny.served("one", tiny.one),
            tiny.served("two", tiny.two),
        )[i % 3]
        harness.add_and_load(f"r{i}", model, tokens=10, prompt=4 + i)

    harness.run()

    assert harness.scheduler.stats.decode_steps == 9
    assert harness.scheduler.stats.generation_tokens == 80


def test_a_batch_never_exceeds_max_batch(tiny: TinyModels) -> None:
    harness = SchedulerHarness(max_batch=3)
    for i in range(7):
        harness.add_and_load(f"r{i}", tiny.served("one", tiny.one) if i % 2 else tiny.served("base"))

    running = []
    while harness.scheduler.has_work:
        harness.scheduler.step()
        running.append(harness.scheduler.stats.running)

    assert max(running) == 3
    assert len(harness.finished) == 7


def test_kv_caches_keep_to_their_budget(tiny: TinyModels) -> None:
    harness = SchedulerHarness(kv_bytes=2 * 256 * 512)  # two rows of 256 positions; a position takes 512 bytes here
    for i in range(5):
        harness.add_and_load(f"r{i}", tiny.served("base"))

    running = []
    while harness.scheduler.has_work:
        harness.scheduler.step()
        running.append(harness.scheduler.stats.running)

    assert max(running) == 2
    assert len(harness.finished) == 5


def test_a_request_that_would_not_fit_alone_is_refused_with_the_figures(tiny: TinyModels) -> None:
    harness = SchedulerHarness(kv_bytes=256 * 512)  # one row of 256 positions
    harness.add_and_load("fits", tiny.served("base"), tokens=6, prompt=250)
    harness.add_and_load("too long", tiny.served("base"), tokens=6, prompt=251)
    harness.run()

    assert harness.finished == ["fits"]
    failed = next(message for message in harness.outputs if isinstance(message, Failed))
    assert (failed.id, failed.status, failed.param) == ("too long", 400, "prompt")
    assert "keys and values of 257 tokens take" in failed.message
    assert "VERITUNE_INFERENCE_MEMORY" in failed.message


def test_kv_caches_of_batches_that_run_nothing_are_freed(tiny: TinyModels) -> None:
    """One batch has a wide KV cache; then a long request of another batch needs the whole budget."""
    harness = SchedulerHarness(kv_bytes=2 * 256 * 512, slice_steps=1)
    one, other = tiny.served("one"), tiny.served("other", base_digest="other")
    for i in range(2):
        harness.add_and_load(f"wide{i}", one, tokens=2)
    harness.add_and_load("long", other, tokens=4, prompt=300)
    for i in range(2):
        harness.add_and_load(f"late{i}", one, tokens=2)
    num_positions = []
    while harness.scheduler.has_work:
        harness.scheduler.step()
        kv_caches = [batch.kv_cache for batch in harness.scheduler._batches.values() if batch.kv_cache is not None]
        num_positions.append(sum(kv_cache.num_rows * kv_cache.capacity for kv_cache in kv_caches))

    assert sorted(harness.finished) == ["late0", "late1", "long", "wide0", "wide1"]
    assert max(num_positions) == 2 * 256


def test_a_large_request_is_not_starved_by_many_small_ones(tiny: TinyModels) -> None:
    harness = SchedulerHarness(kv_bytes=4 * 256 * 512, prefix_cache_bytes=0)
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, deterministic=True)  # in a batch of its own
    asked = 0
    for turn in range(300):
        while asked - len(harness.finished) < 6 + ("long" in harness.finished):
            harness.add(f"short{asked}", tiny.served("base"), tokens=3 + asked % 5)  # not all finish at once
            asked += 1
        if turn == 20:
            long = Generate(id="long", model=tiny.served("base"), prompt=[7] * 500, sampling=sampling)
            harness.scheduler.add(long)
        while not harness.scheduler.has_work:
            harness.scheduler.finish_loads()
        harness.scheduler.step()
        if "long" in harness.finished:
            break
    assert "long" in harness.finished
    harness.run()
    assert len(harness.finished) == asked + 1


def test_the_empty_kv_cache_of_one_batch_blocks_no_other(tiny: TinyModels) -> None:
    """The budget is four rows of 256 positions: one row is in use all the time, another batch needs two at once."""
    harness = SchedulerHarness(kv_bytes=4 * 256 * 512, prefix_cache_bytes=0, slice_steps=1)

    harness.add_and_load("first", tiny.served("base"), tokens=2)
    harness.run()
    harness.add("taken", tiny.served("base"), tokens=200, deterministic=True)
    harness.scheduler.step()
    for number in range(8):
        harness.add_and_load(f"y{number}", tiny.served("base"), tokens=4)
    for _ in range(4):
        harness.scheduler.step()
    harness.add_and_load("two", tiny.served("other", base_digest="other"), tokens=4, prompt=300)
    harness.run()

    assert len(harness.finished) == 11
    assert harness.finished[-1] == "taken"


def test_adapters_wait_until_there_is_memory_for_their_slots(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "CAPACITY_BLOCK", 32)  # so that eight rows take little memory compared with adapters
    known = [tiny.served(f"a{i}", tiny.two if i % 2 else tiny.one) for i in range(4)]
    size = base_bytes(known[0], torch.device("cpu"), torch.float32)
    size += 13 * 2 * weights_bytes(tiny.one, torch.float32) // 4
    harness = SchedulerHarness(
        memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0
    )
    for i in range(12):
        harness.add_and_load(f"r{i}", known[i % 4], tokens=3 + i)
    running = []
    while harness.scheduler.has_work:
        harness.scheduler.step()
        running.append(harness.scheduler.stats.running)
        assert not any(harness.models._evictor.missing(MemoryUse(1)))
        assert not harness.scheduler._deferred

    assert 2 <= max(running) < 8
    assert sorted(harness.finished) == sorted(f"r{i}" for i in range(12))


def test_a_step_reads_no_more_positions_than_the_longest_sequence_has(tiny: TinyModels) -> None:
    """One sequence decodes; another one joins at 300 positions and finishes at 303."""
    alone, harness = SchedulerHarness(), SchedulerHarness(prefix_cache_bytes=0)
    for one in (alone, harness):
        one.add_and_load("short", tiny.served("base"), tokens=80, prompt=5)
    alone.run()
    sizes: list[int] = []

    def step() -> None:
        harness.scheduler.step()
        kv_caches = [batch.kv_cache for batch in harness.scheduler._batches.values() if batch.kv_cache]
        sizes.extend(kv_cache.layers[0].tensors[0].shape[2] for kv_cache in kv_caches)

    for _ in range(5):
        step()
    harness.add_and_load("long", tiny.served("base"), tokens=3, prompt=300)
    while harness.scheduler.has_work:
        step()

    assert [size for size, _ in itertools.groupby(sizes)] == [32, 256, 320, 32, 64, 96]
    assert harness.completions["short"] == alone.completions["short"]


def test_a_kv_cache_that_could_not_grow_can_still_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache = KVCache(3, torch.device("cuda"))  # no CUDA call is made here
    kv_cache.reserve(1, 8)
    new = torch.randn(1, 2, 4)
    for layer in kv_cache.layers:
        layer.write(decode_segment(torch.tensor([0]), 32), new, new)
    calls = iter([kv._allocate, kv._allocate, kv._allocate])

    def scarce(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        return next(calls, no_memory)(like, rows, capacity)

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none")

    with monkeypatch.context() as patch:
        patch.setattr(kv, "_allocate", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            kv_cache.reserve(4, 300)
    assert (kv_cache.num_rows, kv_cache.capacity) == (1, 256)
    kv_cache.reserve(2, 300)
    kv_cache.reserve(4, 300)
    for layer in kv_cache.layers:
        assert layer.tensors[0].shape == (4, 2, 512, 4)
        assert torch.equal(layer.tensors[1][0, :, 0], new[0])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_TOKENS", 16)


@pytest.mark.usefixtures("small_chunks")
def test_a_long_prompt_does_not_delay_decoding_sequences(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    harness.add_and_load("short", tiny.served("one", tiny.one), tokens=20)
    harness.scheduler.step()
    harness.add_and_load("long", tiny.served("two", tiny.two), tokens=5, prompt=380)

    harness.run()

    assert harness.finished == ["short", "long"]


@pytest.mark.usefixtures("small_chunks")
def test_prompts_are_prefilled_whole_while_others_finish_and_are_cancelled(tiny: TinyModels) -> None:
    models = [
        tiny.served("base"),
        tiny.served("one", tiny.one),
        tiny.served("two", tiny.two),
    ]
    asked = {f"r{i}": (models[i % 3], 3 + i % 7, 5 + 61 * i % 300) for i in range(24)}
    alone: dict[str, list[int]] = {}
    for name, (model, tokens, prompt) in asked.items():
        harness = SchedulerHarness(prefix_cache_bytes=0)
        harness.add_and_load(name, model, tokens, prompt)
        harness.run()
        alone |= harness.completions

    harness = SchedulerHarness(max_batch=6, prefix_cache_bytes=0)
    for name, (model, tokens, prompt) in asked.items():
        harness.add_and_load(name, model, tokens, prompt)
    cancelled: list[str] = []
    while harness.scheduler.has_work:
        harness.scheduler.step()
        prefilling = [batch.prefilling for batch in harness.scheduler._batches.values()]
        if len(cancelled) < 4 and prefilling[:1] and prefilling[0] and len(harness.finished) > 3 * len(cancelled):
            cancelled.append(prefilling[0][-1].id)
            harness.scheduler.cancel(cancelled[-1])

    assert len(cancelled) == 4
    assert harness.completions == {name: answer for name, answer in alone.items() if name not in cancelled}


def test_bases_that_do_not_fit_together_take_turns(tiny: TinyModels) -> None:
    size = base_bytes(tiny.served("a"), torch.device("cpu"), torch.float32)
    harness = SchedulerHarness(
        memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0
    )
    for i in range(6):
        harness.add_and_load(f"r{i}", tiny.served(f"b{i % 3}", base_digest=f"b{i % 3}"))
        harness.scheduler.step()
    late = [f"late{i}" for i in range(20)]
    bases = []
    while harness.scheduler.has_work or harness.scheduler.is_loading:
        harness.scheduler.step()
        bases.append(harness.scheduler.stats.bases)
        if late:
            harness.add_and_load(late.pop(), tiny.served("b0", base_digest="b0"))

    assert sorted(harness.finished) == sorted([f"r{i}" for i in range(6)] + [f"late{i}" for i in range(20)])
    assert set(bases) <= {0, 1}
    assert all(harness.finished.index(f"r{i}") < 22 for i in range(6)), "many requests for one base starved the others"


def test_a_deferred_request_can_be_cancelled(tiny: TinyModels) -> None:
    size = base_bytes(tiny.served("a"), torch.device("cpu"), torch.float32)
    harness = SchedulerHarness(
        memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0
    )
    harness.add_and_load("first", tiny.served("a", base_digest="a"))
    harness.scheduler.step()
    harness.add_and_load("second", tiny.served("b", base_digest="b"))
    assert harness.scheduler.stats.waiting == 1
    harness.scheduler.cancel("second")
    assert harness.scheduler.stats.waiting == 0
    harness.run()

    assert harness.finished == ["first"]


def test_a_cancelled_request_frees_its_row_at_once(tiny: TinyModels) -> None:
    harness = SchedulerHarness(max_batch=2)
    for i in range(3):
        harness.add_and_load(f"r{i}", tiny.served("base"), tokens=30)
    for _ in range(4):
        harness.scheduler.step()

    harness.scheduler.cancel("r0")
    harness.scheduler.cancel("r2")
    harness.scheduler.cancel("unknown")
    assert (harness.scheduler.stats.running, harness.scheduler.stats.waiting) == (1, 0)
    harness.run()

    assert harness.finished == ["r1"]


def test_a_bad_model_fails_its_own_requests_only(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    harness.add_and_load("bad", tiny.served("bad", tiny.base))  # a folder that holds no adapter
    harness.add_and_load("good", tiny.served("base"))

    harness.run()

    assert harness.finished == ["good"]
    (failed,) = [message for message in harness.outputs if isinstance(message, Failed)]
    assert (failed.id, failed.status, failed.param) == ("bad", 422, "model")


def test_an_error_while_a_model_is_loaded_fails_no_other_request(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = SchedulerHarness()
    harness.add_and_load("before", tiny.served("base"))
    load = LoadedModels.load

    def broken(self: LoadedModels, served: ServedModel, *in_use: Any) -> Base:
        if served.digest == "one":
            raise ZeroDivisionError
        return load(self, served, *in_use)

    monkeypatch.setattr(LoadedModels, "load", broken)
    harness.add_and_load("bad", tiny.served("one", tiny.one))
    harness.run()

    assert harness.finished == ["before"]
    (failed,) = [message for message in harness.outputs if isinstance(message, Failed)]
    assert (failed.id, failed.status) == ("bad", 500)


def snapshot(tokens: int) -> Snapshot:
    """16 bytes a token."""
    return [(torch.zeros(1, tokens, 2), torch.zeros(1, tokens, 2))]


def test_the_longest_common_prefix_of_the_same_model_is_matched() -> None:
    cache = PrefixCache(budget=10_000)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", [*range(10), *range(50, 70)], snapshot(30))
    cache.store("n", list(range(40)), snapshot(40))

    found = cache.match("m", [*range(15), 99])

    assert found is not None
    assert found.length == 15
    assert cache.match("m", [99]) is None
    assert cache.match("other", list(range(20))) is None


def test_a_stored_prefix_replaces_the_one_it_extends() -> None:
    cache = PrefixCache(budget=10_000)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", list(range(35)), snapshot(35))

    assert cache.num_bytes == 35 * 16
    assert not cache.worth_storing("m", list(range(38)))
    assert cache.worth_storing("m", list(range(60)))


def test_a_prefix_larger_than_the_budget_evicts_nothing() -> None:
    cache = PrefixCache(budget=30 * 16)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", list(range(100, 140)), snapshot(40))

    assert cache.num_bytes == 20 * 16
    assert cache.match("m", list(range(20)))


def test_a_text_prompt_takes_the_memory_of_its_tokens(tiny: TinyModels) -> None:
    text = "Claim: The Danube flows into the Black Sea. " * 5
    tokens = len(Tokenizer.from_file(str(tiny.base / "tokenizer.json")).encode(text).ids)
    assert tokens + 6 <= 256 < len(text) + 50
    harness = SchedulerHarness(kv_bytes=2 * 256 * 512)  # as above
    for name in ("one", "two"):
        sampling = SamplingParams(max_tokens=min(50, 256 - tokens), temperature=0, ignore_eos=True)
        harness.scheduler.add(Generate(id=name, model=tiny.served("base"), prompt=text, sampling=sampling))
        while harness.scheduler.is_loading:
            harness.scheduler.finish_loads()
    for _ in range(3):
        harness.scheduler.step()

    assert harness.scheduler.stats.running == 2


def test_the_least_recently_used_prefix_is_evicted() -> None:
    cache = PrefixCache(budget=50 * 16)
    cache.store("m", [1] * 20, snapshot(20))
    cache.store("m", [2] * 20, snapshot(20))
    cache.match("m", [1] * 5)
    cache.store("m", [3] * 20, snapshot(20))

    assert cache.num_bytes == 40 * 16
    assert cache.match("m", [2] * 20) is None
    assert cache.match("m", [1] * 20) is not None


def test_a_character_appears_with_its_last_byte(tiny: TinyModels) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.base / "tokenizer.json"))
    ids = tokenizer.encode("né €!").ids
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("The ").ids, skip_special=True)

    pieces = [detokenizer.push(token) for token in ids]

    assert "".join(pieces) == "né €!"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_replaced_in_the_end(tiny: TinyModels) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.base / "tokenizer.json"))
    broken = tokenizer.encode("é").ids[0]
    detokenizer = Detokenizer(tokenizer, [], skip_special=True)

    assert "\ufffd" in "".join(detokenizer.push(broken) for _ in range(8))


def test_a_stop_string_is_found_across_pieces_and_never_sent() -> None:
    text = AnswerText(["STOP"], keep_stop=False)
    sent = ""
    for piece in ("one S", "TO", "ne ST", "OP two"):
        text.add(piece)
        sent += text.take(final=False)

    assert text.stop == "STOP"
    assert sent + text.take(final=True) == "one STOne "


def test_the_earliest_stop_string_wins() -> None:
    text = AnswerText(["cd", "b"], keep_stop=True)
    text.add("abcd")

    assert text.stop == "b"
    assert text.take(final=True) == "ab"
