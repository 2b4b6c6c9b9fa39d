"""Captured decode steps give the same logits when they are replayed, whatever ran in between."""

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.inference.fake_capture import FakeCapture
from tests.inference.test_llama_forward import FAMILY, SETTINGS, SHAPE, assert_same, make_adapters, save, served
from worker.inference.cache.cuda_graphs import MAX_GRAPHS, CapturableStep, CudaGraphCache, Run
from worker.inference.cache.kv_cache import CAPACITY_BLOCK, KVCache
from worker.inference.engine.offline import decode, prefill
from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import EngineOutput, Finished, Generate
from worker.inference.model import adapters
from worker.inference.model.llama_forward import LlamaForward
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import SamplingParams, ServedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
LENGTHS = [250, 3, 64, 31, 200]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """Bases that are loaded from now on capture their steps with it."""
    capture = FakeCapture()
    monkeypatch.setattr(adapters, "build_llama_forward", lambda model: LlamaForward(model, capture))
    return capture


def loaded(base: Path, folder: Path) -> tuple[LoadedModels, dict[str, ServedModel]]:
    known = make_adapters(base, folder, 5) | {"base": served(base)}
    models = LoadedModels(SETTINGS)
    for model in known.values():
        models.load(model, [])
    return models, known


def decoded(models: LoadedModels, known: dict[str, ServedModel], seed: int) -> list[torch.Tensor]:
    """Logits of sequences that finish, are replaced, and outgrow the KV cache's first capacity."""
    draw = random.Random(seed)
    kv_cache = KVCache(2)
    kv_cache.reserve(3, CAPACITY_BLOCK)
    found: list[torch.Tensor] = []
    for _ in range(6):
        rows = [draw.choice(list(known)) for _ in range(draw.randint(1, len(LENGTHS)))]
        lengths = [LENGTHS[row] + draw.randint(0, 3) for row in range(len(rows))]
        kv_cache.reserve(len(rows), max(lengths) + 12)
        for row, (name, length) in enumerate(zip(rows, lengths, strict=True)):
            prompt = [draw.randint(3, 300) for _ in range(length)]
            found.append(prefill(models.forward([known[name]]), kv_cache, row, prompt))
        forward = models.forward([known[name] for name in rows])
        for _ in range(9):
            found += decode(forward, kv_cache, [draw.randint(3, 300) for _ in rows], lengths).unbind()
            lengths = [length + 1 for length in lengths]
    return found


def test_replayed_steps_give_the_logits_of_eager_ones(
    tmp_path: Path, capture: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    capturing, known = loaded(base, tmp_path)
    monkeypatch.undo()
    plain, _ = loaded(base, tmp_path)

    for seed in range(4):
        assert_same(decoded(capturing, known, seed), decoded(plain, known, seed))

    assert capture.num_replayed > 2 * capture.num_captured > 0


def test_a_reloaded_base_drops_the_graphs_of_the_old_one(tmp_path: Path, capture: FakeCapture) -> None:
    first, second = (save(tmp_path / name, FAMILY["llama"]()) for name in ("first", "second"))
    completions: dict[str, list[int]] = {}
    for directories in ([first], [second], [first, second, first, second]):
        models = LoadedModels(SETTINGS)
        outputs: list[EngineOutput] = []
        settings = SETTINGS.model_copy(update={"prefix_cache_bytes": 0})  # both bases have one digest here
        scheduler = Scheduler(models, settings, outputs.append)
        for directory in directories:
            models._bases.clear()  # as if it was evicted
            answered = answer(scheduler, outputs, directory)
            assert completions.setdefault(directory.name, answered) == answered
    assert completions["first"] != completions["second"]
    assert capture.num_replayed


def answer(scheduler: Scheduler, outputs: list[EngineOutput], directory: Path) -> list[int]:
    outputs.clear()
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    scheduler.add(Generate(id="a", model=served(directory), prompt=[5, 6, 7], sampling=sampling))
    while scheduler.has_work or scheduler.is_loading:
        scheduler.step()
    return next(message.token_ids for message in outputs if isinstance(message, Finished))


def test_a_kv_cache_keeps_its_graphs_for_the_next_batch(tmp_path: Path, capture: FakeCapture) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    outputs: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(SETTINGS), SETTINGS, outputs.append)
    first = answer(scheduler, outputs, base)
    num_captured = capture.num_captured

    assert answer(scheduler, outputs, base) == first
    assert capture.num_captured == num_captured > 0


def test_nothing_is_captured_while_a_base_is_loaded(tmp_path: Path, capture: FakeCapture) -> None:
    base = served(save(tmp_path / "base", FAMILY["llama"]()))
    models = LoadedModels(SETTINGS)
    models.load(base, [])
    kv_cache = KVCache(2)
    kv_cache.reserve(1, 16)
    loading = base.model_copy(update={"base_digest": "loading"})
    models.begin_loading_base(loading, [base])
    for length in range(4):
        decode(models.forward([base]), kv_cache, [5], [length])
    assert capture.num_captured == 0
    models.finish_loading_base("loading", None)
    for length in range(4, 8):
        decode(models.forward([base]), kv_cache, [5], [length])
    assert (capture.num_captured, capture.num_replayed) == (1, 4)


def test_a_deterministic_request_is_computed_without_other_adapters_slots(tmp_path: Path, capture: FakeCapture) -> None:
    """Its adapter's slot, and the width of slots, would depend on the requests before it."""
    base = save(tmp_path / "base", FAMILY["llama"]())
    known = make_adapters(base, tmp_path, 2)
    outputs: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(SETTINGS), SETTINGS, outputs.append)
    for number, (deterministic, wanted) in enumerate([(True, 0), (False, 1), (True, 1)]):
        sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, deterministic=deterministic)
        scheduler.add(Generate(id=str(number), model=known["a0"], prompt=[5, 6, 7], sampling=sampling))
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
        assert capture.num_captured == wanted
    assert len({tuple(message.token_ids) for message in outputs if isinstance(message, Finished)}) == 1


def test_a_retired_kv_cache_over_the_budget_is_not_kept(tmp_path: Path, capture: FakeCapture) -> None:
    wide = LlamaConfig(**{**SHAPE, "max_position_embeddings": 4 * CAPACITY_BLOCK})
    base = served(save(tmp_path / "base", LlamaForCausalLM(wide))).model_copy(
        update={"max_model_len": 4 * CAPACITY_BLOCK}
    )
    models = LoadedModels(SETTINGS)
    position = models.load(base, []).kv_shape.position_bytes
    outputs: list[EngineOutput] = []
    settings = SETTINGS.model_copy(update={"kv_bytes": 4 * CAPACITY_BLOCK * position, "prefix_cache_bytes": 0})
    scheduler = Scheduler(models, settings, outputs.append)

    def max_running(prompts: list[list[int]]) -> int:
        sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            scheduler.add(Generate(id=str(number), model=base, prompt=prompt, sampling=sampling))
        highest = 0
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
            highest = max(highest, scheduler.stats.running)
        return highest

    many_prompts = [[5 + number] for number in range(4)]
    together = max_running(many_prompts)
    max_running([[7] * (CAPACITY_BLOCK + 44)])
    assert max_running(many_prompts) == together > 1


@pytest.mark.parametrize("steps", [1, 4])
def test_captured_steps_keep_no_base_in_memory(tmp_path: Path, capture: FakeCapture, steps: int) -> None:
    """The fake holds the tensors that it replays, a CUDA graph does not: here every capture fails."""
    models = LoadedModels(SETTINGS)
    base = weakref.ref(models.load(served(save(tmp_path / "base", FAMILY["llama"]())), []).model)
    capture.fails = True
    kv_cache = KVCache(2)
    kv_cache.reserve(1, 16)
    for length in range(steps):
        decode(models.forward([served(tmp_path / "base")]), kv_cache, [5], [length])
    models = LoadedModels(SETTINGS)
    gc.collect()
    assert len(kv_cache.graphs) == 1
    assert base() is None


def test_stale_graphs_and_the_least_recently_used_are_dropped() -> None:
    graphs, made = CudaGraphCache(), []

    def make() -> CapturableStep:
        made.append(CapturableStep(FakeCapture(), 4, [torch.zeros(2)]))
        return made[-1]

    slots, other_slots, model, other_model = object(), object(), object(), object()
    first = graphs.get_or_create((model, slots), "a", make)
    assert graphs.get_or_create((model, None), "a", make) is graphs.get_or_create((model, slots), "a", make) is first
    moved = graphs.get_or_create((model, other_slots), "a", make)
    assert moved is not first
    reloaded = graphs.get_or_create((other_model, other_slots), "a", make)
    assert reloaded is not moved
    assert len(graphs) == 1
    for number in range(MAX_GRAPHS):
        graphs.get_or_create((other_model, None), number, make)
    assert len(graphs) == MAX_GRAPHS
    assert graphs.get_or_create((other_model, None), "a", make) is made[-1]


def test_missing_rows_are_padded_and_cut_off() -> None:
    step = CapturableStep(FakeCapture(), 4, [torch.zeros(1), torch.zeros(1)])
    for x in ([1.0], [2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0]):
        assert step(torch.add, [torch.tensor(x), torch.ones(len(x))], (0, 0)).tolist() == [value + 1 for value in x]


def test_a_step_that_cannot_be_captured_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def fails(run: Run) -> Run:
        raise RuntimeError("not while capturing")

    step = CapturableStep(fails, 2, [torch.zeros(1)])
    assert [step(torch.neg, [torch.tensor([x])], (0,)).item() for x in (1.0, 2.0, 3.0)] == [-1.0, -2.0, -3.0]
    assert caplog.text.count("not while capturing") == 1
