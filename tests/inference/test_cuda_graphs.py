"""Steps that are recorded and replayed: the same answers, whatever else has happened in between."""

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.inference.graph_tape import Tape
from tests.inference.test_llama_forward import FAMILY, SETTINGS, SHAPE, assert_same, many, save, served
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
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Bases that are loaded from now on record their steps on it."""
    tape = Tape()
    monkeypatch.setattr(adapters, "build_llama_forward", lambda model: LlamaForward(model, tape))
    return tape


def loaded(base: Path, folder: Path) -> tuple[LoadedModels, dict[str, ServedModel]]:
    known = many(base, folder, 5) | {"base": served(base)}
    models = LoadedModels(SETTINGS)
    for model in known.values():
        models.load(model, [])
    return models, known


def decoded(models: LoadedModels, known: dict[str, ServedModel], seed: int) -> list[torch.Tensor]:
    """Logits of rows that are dropped, come anew, and cross the end of what a store first holds."""
    draw = random.Random(seed)
    store = KVCache(2)
    store.reserve(3, CAPACITY_BLOCK)
    found: list[torch.Tensor] = []
    for _ in range(6):
        rows = [draw.choice(list(known)) for _ in range(draw.randint(1, len(LENGTHS)))]
        lengths = [LENGTHS[row] + draw.randint(0, 3) for row in range(len(rows))]
        store.reserve(len(rows), max(lengths) + 12)
        for row, (name, length) in enumerate(zip(rows, lengths, strict=True)):
            prompt = [draw.randint(3, 300) for _ in range(length)]
            found.append(prefill(models.forward([known[name]]), store, row, prompt))
        forward = models.forward([known[name] for name in rows])
        for _ in range(9):
            found += decode(forward, store, [draw.randint(3, 300) for _ in rows], lengths).unbind()
            lengths = [length + 1 for length in lengths]
    return found


def test_replayed_steps_answer_as_others_do(tmp_path: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    recording, known = loaded(base, tmp_path)
    monkeypatch.undo()
    plain, _ = loaded(base, tmp_path)

    for seed in range(4):
        assert_same(decoded(recording, known, seed), decoded(plain, known, seed))

    assert tape.replayed > 2 * tape.recorded > 0


def test_a_base_that_was_loaded_anew_is_not_answered_from_the_old_one(tmp_path: Path, tape: Tape) -> None:
    first, second = (save(tmp_path / name, FAMILY["llama"]()) for name in ("first", "second"))
    said: dict[str, list[int]] = {}
    for directories in ([first], [second], [first, second, first, second]):
        models = LoadedModels(SETTINGS)
        scheduler_said: list[EngineOutput] = []
        settings = SETTINGS.model_copy(update={"prefix_cache_bytes": 0})  # both bases go by one digest here
        scheduler = Scheduler(models, settings, scheduler_said.append)
        for directory in directories:
            models._bases.clear()  # as when its memory was wanted
            answered = answer(scheduler, scheduler_said, directory)
            assert said.setdefault(directory.name, answered) == answered
    assert said["first"] != said["second"]
    assert tape.replayed


def answer(scheduler: Scheduler, said: list[EngineOutput], directory: Path) -> list[int]:
    said.clear()
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    scheduler.add(Generate(id="a", model=served(directory), prompt=[5, 6, 7], sampling=sampling))
    while scheduler.has_work or scheduler.is_loading:
        scheduler.step()
    return next(message.token_ids for message in said if isinstance(message, Finished))


def test_a_store_keeps_its_recordings_for_whoever_comes_next(tmp_path: Path, tape: Tape) -> None:
    base = save(tmp_path / "base", FAMILY["llama"]())
    said: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(SETTINGS), SETTINGS, said.append)
    first = answer(scheduler, said, base)
    recorded = tape.recorded

    assert answer(scheduler, said, base) == first
    assert tape.recorded == recorded > 0


def test_nothing_is_recorded_while_a_base_is_read(tmp_path: Path, tape: Tape) -> None:
    base = served(save(tmp_path / "base", FAMILY["llama"]()))
    models = LoadedModels(SETTINGS)
    models.load(base, [])
    store = KVCache(2)
    store.reserve(1, 16)
    coming = base.model_copy(update={"base_digest": "coming"})
    models.begin_loading_base(coming, [base])
    for length in range(4):
        decode(models.forward([base]), store, [5], [length])
    assert tape.recorded == 0
    models.finish_loading_base("coming", None)
    for length in range(4, 8):
        decode(models.forward([base]), store, [5], [length])
    assert (tape.recorded, tape.replayed) == (1, 4)


def test_a_deterministic_answer_is_computed_beside_nobody(tmp_path: Path, tape: Tape) -> None:
    """Its adapter's place, and how wide places are, would depend on who was there before."""
    base = save(tmp_path / "base", FAMILY["llama"]())
    known = many(base, tmp_path, 2)
    said: list[EngineOutput] = []
    scheduler = Scheduler(LoadedModels(SETTINGS), SETTINGS, said.append)
    for number, (deterministic, wanted) in enumerate([(True, 0), (False, 1), (True, 1)]):
        sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, deterministic=deterministic)
        scheduler.add(Generate(id=str(number), model=known["a0"], prompt=[5, 6, 7], sampling=sampling))
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
        assert tape.recorded == wanted
    assert len({tuple(message.token_ids) for message in said if isinstance(message, Finished)}) == 1


def test_a_store_that_would_go_beyond_the_budget_is_not_kept(tmp_path: Path, tape: Tape) -> None:
    wide = LlamaConfig(**{**SHAPE, "max_position_embeddings": 4 * CAPACITY_BLOCK})
    base = served(save(tmp_path / "base", LlamaForCausalLM(wide))).model_copy(
        update={"max_model_len": 4 * CAPACITY_BLOCK}
    )
    models = LoadedModels(SETTINGS)
    position = models.load(base, []).kv_shape.position_bytes
    said: list[EngineOutput] = []
    settings = SETTINGS.model_copy(update={"kv_bytes": 4 * CAPACITY_BLOCK * position, "prefix_cache_bytes": 0})
    scheduler = Scheduler(models, settings, said.append)

    def running(prompts: list[list[int]]) -> int:
        sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            scheduler.add(Generate(id=str(number), model=base, prompt=prompt, sampling=sampling))
        most = 0
        while scheduler.has_work or scheduler.is_loading:
            scheduler.step()
            most = max(most, scheduler.stats.running)
        return most

    crowd = [[5 + number] for number in range(4)]
    together = running(crowd)
    running([[7] * (CAPACITY_BLOCK + 44)])
    assert running(crowd) == together > 1


@pytest.mark.parametrize("steps", [1, 4])
def test_recordings_keep_no_base_in_memory(tmp_path: Path, tape: Tape, steps: int) -> None:
    """A tape holds what it replays, a CUDA graph does not: only steps that were not recorded are looked at here."""
    models = LoadedModels(SETTINGS)
    base = weakref.ref(models.load(served(save(tmp_path / "base", FAMILY["llama"]())), []).model)
    tape.unable = True
    store = KVCache(2)
    store.reserve(1, 16)
    for length in range(steps):
        decode(models.forward([served(tmp_path / "base")]), store, [5], [length])
    models = LoadedModels(SETTINGS)
    gc.collect()
    assert len(store.graphs) == 1
    assert base() is None


def test_recordings_of_another_world_and_the_oldest_are_forgotten() -> None:
    kept, made = CudaGraphCache(), []

    def make() -> CapturableStep:
        made.append(CapturableStep(Tape(), 4, [torch.zeros(2)]))
        return made[-1]

    here, there, model, other = object(), object(), object(), object()
    first = kept.get_or_create((model, here), "a", make)
    assert kept.get_or_create((model, None), "a", make) is kept.get_or_create((model, here), "a", make) is first
    moved = kept.get_or_create((model, there), "a", make)
    assert moved is not first
    read_anew = kept.get_or_create((other, there), "a", make)
    assert read_anew is not moved
    assert len(kept) == 1
    for number in range(MAX_GRAPHS):
        kept.get_or_create((other, None), number, make)
    assert len(kept) == MAX_GRAPHS
    assert kept.get_or_create((other, None), "a", make) is made[-1]


def test_rows_that_are_not_there_are_filled_up_and_cut_off() -> None:
    recording = CapturableStep(Tape(), 4, [torch.zeros(1), torch.zeros(1)])
    for x in ([1.0], [2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0]):
        assert recording(torch.add, [torch.tensor(x), torch.ones(len(x))], (0, 0)).tolist() == [
            value + 1 for value in x
        ]


def test_what_cannot_be_recorded_is_done_as_before(caplog: pytest.LogCaptureFixture) -> None:
    def unable(run: Run) -> Run:
        raise RuntimeError("not while capturing")

    recording = CapturableStep(unable, 2, [torch.zeros(1)])
    assert [recording(torch.neg, [torch.tensor([x])], (0,)).item() for x in (1.0, 2.0, 3.0)] == [-1.0, -2.0, -3.0]
    assert caplog.text.count("not while capturing") == 1
