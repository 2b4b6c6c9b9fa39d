"""Turns and slots, the prefix cache and the text of an answer, without processes."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.inference.conftest import Shelf
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


class Desk:
    """A scheduler and all that it said. `kind`: of its models."""

    def __init__(self, kind: type[LoadedModels] = LoadedModels, **settings: int) -> None:
        given = EngineSettings.model_validate({"device": "cpu", "dtype": "float32", **settings})
        self.said: list[EngineOutput] = []
        self.models = kind(given)
        self.scheduler = Scheduler(self.models, given, self.said.append)

    def ask(self, request_id: str, model: ServedModel, tokens: int = 6, prompt: int = 4) -> None:
        """Queue a request, whose base is there when this returns."""
        self.hand_in(request_id, model, tokens, prompt)
        while self.scheduler.is_loading:
            self.scheduler.finish_loads()

    def hand_in(self, request_id: str, model: ServedModel, tokens: int = 6, prompt: int = 4, **more: Any) -> None:
        """Queue a request. `more` of its sampling may be given."""
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **more)
        self.scheduler.add(Generate(id=request_id, model=model, prompt=list(range(3, 3 + prompt)), sampling=sampling))

    def run(self) -> None:
        """Work until nothing is left."""
        while self.scheduler.has_work or self.scheduler.is_loading:
            self.scheduler.step()

    @property
    def finished(self) -> list[str]:
        """Who was answered, in order."""
        return list(self.answers)

    @property
    def answers(self) -> dict[str, list[int]]:
        """Their token ids, in the order in which they were finished."""
        return {message.id: message.token_ids for message in self.said if isinstance(message, Finished)}


def test_a_crowd_at_one_adapter_does_not_starve_another(shelf: Shelf) -> None:
    desk = Desk(max_batch=2, slice_steps=4)
    for i in range(12):
        desk.ask(f"crowd{i}", shelf.served("one", shelf.one))
    for _ in range(5):
        desk.scheduler.step()
    desk.ask("single", shelf.served("two", shelf.two))

    desk.run()

    assert len(desk.finished) == 13
    assert desk.finished.index("single") <= 4


def test_who_is_answered_alone_takes_turns_with_the_others(shelf: Shelf) -> None:
    desk = Desk(max_batch=4, slice_steps=4)
    for i in range(12):
        desk.hand_in(f"crowd{i}", shelf.served("one", shelf.one), deterministic=True)
    while desk.scheduler.is_loading:
        desk.scheduler.finish_loads()
    desk.ask("single", shelf.served("two", shelf.two))
    desk.hand_in("alone", shelf.served("two", shelf.two), deterministic=True)

    desk.run()

    assert len(desk.finished) == 14
    assert desk.finished.index("single") <= 3
    assert desk.finished.index("alone") <= 3


@pytest.fixture
def wild(shelf: Shelf, tmp_path: Path) -> ServedModel:
    """An adapter whose numbers overflow."""
    copy = Path(shutil.copytree(shelf.one, tmp_path / "wild"))
    weights = load_file(copy / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(value, 1e30) for name, value in weights.items()}, copy / "adapter_model.safetensors"
    )
    return shelf.served("wild", copy)


@pytest.fixture
def sane(shelf: Shelf) -> list[int]:
    """What the base answers in clean rows."""
    desk = Desk()
    desk.ask("next", shelf.served("base"))
    desk.run()
    return desk.answers["next"]


def failures(desk: Desk) -> list[tuple[str, int]]:
    return [(failed.id, failed.status) for failed in desk.said if isinstance(failed, Failed)]


def test_a_row_whose_numbers_overflowed_is_clean_for_the_next(shelf: Shelf, wild: ServedModel, sane: list[int]) -> None:
    desk = Desk()
    desk.ask("company", shelf.served("base"), tokens=60)
    desk.ask("wild", wild, prompt=30)
    for _ in range(3):
        desk.scheduler.step()
    assert failures(desk) == [("wild", 500)]

    desk.ask("next", shelf.served("base"))
    desk.run()

    assert desk.answers["next"] == sane
    assert len(desk.answers["company"]) == 60


def test_a_row_in_which_a_prompt_overflowed_is_clean_when_its_reader_was_cancelled(
    shelf: Shelf, wild: ServedModel, sane: list[int]
) -> None:
    desk = Desk(prefix_cache_bytes=0)
    desk.ask("company", shelf.served("base"), tokens=60)
    desk.ask("wild", wild, prompt=300)
    desk.scheduler.step()
    assert [sequence.id for batch in desk.scheduler._batches.values() for sequence in batch.prefilling] == ["wild"]

    desk.scheduler.cancel("wild")
    desk.ask("next", shelf.served("base"))
    desk.run()

    assert desk.answers["next"] == sane
    assert failures(desk) == []


def test_a_row_in_which_a_prompt_overflowed_is_clean_when_its_reader_has_moved(
    shelf: Shelf, wild: ServedModel, sane: list[int]
) -> None:
    desk = Desk(prefix_cache_bytes=0)
    desk.ask("short", shelf.served("base"), tokens=1)
    desk.ask("company", shelf.served("base"), tokens=60)
    desk.ask("wild", wild, prompt=300)
    while not failures(desk):
        desk.scheduler.step()

    desk.ask("next", shelf.served("base"))
    desk.ask("after", shelf.served("base"))
    desk.run()

    assert failures(desk) == [("wild", 500)]
    assert desk.answers["next"] == desk.answers["after"] == sane


def test_a_prompt_that_cannot_be_scored_fails_by_itself(shelf: Shelf, wild: ServedModel) -> None:
    desk = Desk()
    desk.ask("company", shelf.served("base"), tokens=9)
    desk.hand_in("scored", wild, prompt_logprobs=2)
    desk.run()
    assert failures(desk) == [("scored", 500)]
    assert len(desk.answers["company"]) == 9


def test_an_unforeseen_fault_of_one_answer_fails_no_other(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Sequence.sample_next

    def faulty(sequence: Sequence, logits: torch.Tensor) -> None:
        if sequence.id == "odd":
            raise RuntimeError("out of luck")
        advance(sequence, logits)

    monkeypatch.setattr(Sequence, "sample_next", faulty)
    desk = Desk()
    for name in ("one", "odd", "other"):
        desk.ask(name, shelf.served("base"))
    desk.run()
    assert failures(desk) == [("odd", 500)]
    assert sorted(desk.finished) == ["one", "other"]


def test_what_is_remembered_is_of_one_base_and_counted(shelf: Shelf) -> None:
    desk = Desk()
    for number, digest in enumerate(("base", "base", "other")):
        desk.ask(str(number), shelf.served("same", shelf.one, base_digest=digest), prompt=40)
        desk.run()
    cached = [message.cached_tokens for message in desk.said if isinstance(message, Finished)]
    assert cached == [0, 39, 0]
    assert (desk.scheduler.stats.prefix_hits, desk.scheduler.stats.prefix_queries) == (39, 120)


def test_long_answers_of_one_adapter_let_others_through(shelf: Shelf) -> None:
    desk = Desk(max_batch=4, slice_steps=4)
    desk.ask("long", shelf.served("one", shelf.one), tokens=200)
    desk.scheduler.step()
    desk.ask("short", shelf.served("two", shelf.two), tokens=3)

    desk.run()

    assert desk.finished == ["short", "long"]


def test_sequences_of_one_model_share_their_decode_steps(shelf: Shelf) -> None:
    desk = Desk()
    for i in range(8):
        desk.ask(f"r{i}", shelf.served("base"), tokens=10, prompt=4 + i)

    desk.run()

    assert desk.scheduler.stats.decode_steps == 9
    assert desk.scheduler.stats.generation_tokens == 80


def test_adapters_over_one_base_share_their_decode_steps(shelf: Shelf) -> None:
    desk = Desk()
    for i in range(8):
        model = (shelf.served("base"), shelf.served("one", shelf.one), shelf.served("two", shelf.two))[i % 3]
        desk.ask(f"r{i}", model, tokens=10, prompt=4 + i)

    desk.run()

    assert desk.scheduler.stats.decode_steps == 9
    assert desk.scheduler.stats.generation_tokens == 80


def test_a_batch_never_exceeds_its_slots(shelf: Shelf) -> None:
    desk = Desk(max_batch=3)
    for i in range(7):
        desk.ask(f"r{i}", shelf.served("one", shelf.one) if i % 2 else shelf.served("base"))

    running = []
    while desk.scheduler.has_work:
        desk.scheduler.step()
        running.append(desk.scheduler.stats.running)

    assert max(running) == 3
    assert len(desk.finished) == 7


def test_the_store_of_keys_and_values_keeps_to_its_budget(shelf: Shelf) -> None:
    desk = Desk(kv_bytes=2 * 256 * 512)  # two rows of 256 positions; a position takes 512 bytes here
    for i in range(5):
        desk.ask(f"r{i}", shelf.served("base"))

    running = []
    while desk.scheduler.has_work:
        desk.scheduler.step()
        running.append(desk.scheduler.stats.running)

    assert max(running) == 2
    assert len(desk.finished) == 5


def test_a_request_that_would_not_fit_alone_is_refused_with_the_figures(shelf: Shelf) -> None:
    desk = Desk(kv_bytes=256 * 512)  # one row of 256 positions
    desk.ask("fits", shelf.served("base"), tokens=6, prompt=250)
    desk.ask("too long", shelf.served("base"), tokens=6, prompt=251)
    desk.run()

    assert desk.finished == ["fits"]
    failed = next(message for message in desk.said if isinstance(message, Failed))
    assert (failed.id, failed.status, failed.param) == ("too long", 400, "prompt")
    assert "keys and values of 257 tokens take" in failed.message
    assert "VERITUNE_INFERENCE_MEMORY" in failed.message


def test_kv_caches_of_batches_that_run_nothing_are_freed(shelf: Shelf) -> None:
    """A wide store of one group, and a long request of another, which takes all that there is."""
    desk = Desk(kv_bytes=2 * 256 * 512, slice_steps=1)
    one, other = shelf.served("one"), shelf.served("other", base_digest="other")
    for i in range(2):
        desk.ask(f"wide{i}", one, tokens=2)
    desk.ask("long", other, tokens=4, prompt=300)
    for i in range(2):
        desk.ask(f"late{i}", one, tokens=2)
    held = []
    while desk.scheduler.has_work:
        desk.scheduler.step()
        stores = [batch.kv_cache for batch in desk.scheduler._batches.values() if batch.kv_cache is not None]
        held.append(sum(store.num_rows * store.capacity for store in stores))

    assert sorted(desk.finished) == ["late0", "late1", "long", "wide0", "wide1"]
    assert max(held) == 2 * 256


def test_a_request_that_needs_much_memory_is_not_kept_out_by_many_that_need_little(shelf: Shelf) -> None:
    desk = Desk(kv_bytes=4 * 256 * 512, prefix_cache_bytes=0)
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, deterministic=True)  # in a group of its own
    asked = 0
    for turn in range(300):
        while asked - len(desk.finished) < 6 + ("long" in desk.finished):
            desk.hand_in(f"short{asked}", shelf.served("base"), tokens=3 + asked % 5)  # not all leave at once
            asked += 1
        if turn == 20:
            long = Generate(id="long", model=shelf.served("base"), prompt=[7] * 500, sampling=sampling)
            desk.scheduler.add(long)
        while not desk.scheduler.has_work:
            desk.scheduler.finish_loads()
        desk.scheduler.step()
        if "long" in desk.finished:
            break
    assert "long" in desk.finished
    desk.run()
    assert len(desk.finished) == asked + 1


def test_an_empty_store_of_one_group_keeps_no_other_out(shelf: Shelf) -> None:
    """There is room for four rows of 256 positions: one is taken all the time, another group wants two at once."""
    desk = Desk(kv_bytes=4 * 256 * 512, prefix_cache_bytes=0, slice_steps=1)

    desk.ask("first", shelf.served("base"), tokens=2)
    desk.run()
    desk.hand_in("taken", shelf.served("base"), tokens=200, deterministic=True)
    desk.scheduler.step()
    for number in range(8):
        desk.ask(f"y{number}", shelf.served("base"), tokens=4)
    for _ in range(4):
        desk.scheduler.step()
    desk.ask("two", shelf.served("other", base_digest="other"), tokens=4, prompt=300)
    desk.run()

    assert len(desk.finished) == 11
    assert desk.finished[-1] == "taken"


def test_adapters_for_whose_places_there_is_no_memory_wait_for_others_to_leave(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "CAPACITY_BLOCK", 32)  # so that eight rows are small beside adapters
    known = [shelf.served(f"a{i}", shelf.two if i % 2 else shelf.one) for i in range(4)]
    size = base_bytes(known[0], torch.device("cpu"), torch.float32)
    size += 13 * 2 * weights_bytes(shelf.one, torch.float32) // 4
    desk = Desk(memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0)
    for i in range(12):
        desk.ask(f"r{i}", known[i % 4], tokens=3 + i)
    running = []
    while desk.scheduler.has_work:
        desk.scheduler.step()
        running.append(desk.scheduler.stats.running)
        assert not any(desk.models._evictor.missing(MemoryUse(1)))
        assert not desk.scheduler._deferred

    assert 2 <= max(running) < 8
    assert sorted(desk.finished) == sorted(f"r{i}" for i in range(12))


def test_a_step_looks_no_further_than_the_longest_that_is_there(shelf: Shelf) -> None:
    """Beside an answer, another one that joins at 300 positions and leaves at 303."""
    alone, desk = Desk(), Desk(prefix_cache_bytes=0)
    for one in (alone, desk):
        one.ask("short", shelf.served("base"), tokens=80, prompt=5)
    alone.run()
    sizes: list[int] = []

    def turned() -> None:
        desk.scheduler.step()
        stores = [batch.kv_cache for batch in desk.scheduler._batches.values() if batch.kv_cache]
        sizes.extend(store.layers[0].tensors[0].shape[2] for store in stores)

    for _ in range(5):
        turned()
    desk.ask("long", shelf.served("base"), tokens=3, prompt=300)
    while desk.scheduler.has_work:
        turned()

    assert [size for size, _ in itertools.groupby(sizes)] == [32, 256, 320, 32, 64, 96]
    assert desk.answers["short"] == alone.answers["short"]


def test_a_store_for_whose_growth_there_was_no_memory_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = KVCache(3, torch.device("cuda"))  # of which it asks nothing here
    store.reserve(1, 8)
    new = torch.randn(1, 2, 4)
    for layer in store.layers:
        layer.write(decode_segment(torch.tensor([0]), 32), new, new)
    calls = iter([kv._allocate, kv._allocate, kv._allocate])

    def scarce(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        return next(calls, no_memory)(like, rows, capacity)

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none")

    with monkeypatch.context() as patch:
        patch.setattr(kv, "_allocate", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            store.reserve(4, 300)
    assert (store.num_rows, store.capacity) == (1, 256)
    store.reserve(2, 300)
    store.reserve(4, 300)
    for layer in store.layers:
        assert layer.tensors[0].shape == (4, 2, 512, 4)
        assert torch.equal(layer.tensors[1][0, :, 0], new[0])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_TOKENS", 16)


@pytest.mark.usefixtures("small_chunks")
def test_a_long_prompt_holds_nobody_up(shelf: Shelf) -> None:
    desk = Desk()
    desk.ask("short", shelf.served("one", shelf.one), tokens=20)
    desk.scheduler.step()
    desk.ask("long", shelf.served("two", shelf.two), tokens=5, prompt=380)

    desk.run()

    assert desk.finished == ["short", "long"]


@pytest.mark.usefixtures("small_chunks")
def test_prompts_are_read_whole_while_others_leave_and_are_cancelled(shelf: Shelf) -> None:
    models = [shelf.served("base"), shelf.served("one", shelf.one), shelf.served("two", shelf.two)]
    asked = {f"r{i}": (models[i % 3], 3 + i % 7, 5 + 61 * i % 300) for i in range(24)}
    alone: dict[str, list[int]] = {}
    for name, (model, tokens, prompt) in asked.items():
        desk = Desk(prefix_cache_bytes=0)
        desk.ask(name, model, tokens, prompt)
        desk.run()
        alone |= desk.answers

    desk = Desk(max_batch=6, prefix_cache_bytes=0)
    for name, (model, tokens, prompt) in asked.items():
        desk.ask(name, model, tokens, prompt)
    gone: list[str] = []
    while desk.scheduler.has_work:
        desk.scheduler.step()
        reading = [batch.prefilling for batch in desk.scheduler._batches.values()]
        if len(gone) < 4 and reading[:1] and reading[0] and len(desk.finished) > 3 * len(gone):
            gone.append(reading[0][-1].id)
            desk.scheduler.cancel(gone[-1])

    assert len(gone) == 4
    assert desk.answers == {name: answer for name, answer in alone.items() if name not in gone}


def test_bases_that_do_not_fit_together_take_turns(shelf: Shelf) -> None:
    size = base_bytes(shelf.served("a"), torch.device("cpu"), torch.float32)
    desk = Desk(memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0)
    for i in range(6):
        desk.ask(f"r{i}", shelf.served(f"b{i % 3}", base_digest=f"b{i % 3}"))
        desk.scheduler.step()
    late = [f"late{i}" for i in range(20)]
    bases = []
    while desk.scheduler.has_work or desk.scheduler.is_loading:
        desk.scheduler.step()
        bases.append(desk.scheduler.stats.bases)
        if late:
            desk.ask(late.pop(), shelf.served("b0", base_digest="b0"))

    assert sorted(desk.finished) == sorted([f"r{i}" for i in range(6)] + [f"late{i}" for i in range(20)])
    assert set(bases) <= {0, 1}
    assert all(desk.finished.index(f"r{i}") < 22 for i in range(6)), "a crowd at one base kept the others out"


def test_a_request_that_waits_for_room_can_be_cancelled(shelf: Shelf) -> None:
    size = base_bytes(shelf.served("a"), torch.device("cpu"), torch.float32)
    desk = Desk(memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0)
    desk.ask("first", shelf.served("a", base_digest="a"))
    desk.scheduler.step()
    desk.ask("second", shelf.served("b", base_digest="b"))
    assert desk.scheduler.stats.waiting == 1
    desk.scheduler.cancel("second")
    assert desk.scheduler.stats.waiting == 0
    desk.run()

    assert desk.finished == ["first"]


def test_a_cancelled_request_is_gone_at_once(shelf: Shelf) -> None:
    desk = Desk(max_batch=2)
    for i in range(3):
        desk.ask(f"r{i}", shelf.served("base"), tokens=30)
    for _ in range(4):
        desk.scheduler.step()

    desk.scheduler.cancel("r0")
    desk.scheduler.cancel("r2")
    desk.scheduler.cancel("never heard of")
    assert (desk.scheduler.stats.running, desk.scheduler.stats.waiting) == (1, 0)
    desk.run()

    assert desk.finished == ["r1"]


def test_a_bad_model_fails_its_own_requests_only(shelf: Shelf) -> None:
    desk = Desk()
    desk.ask("bad", shelf.served("bad", shelf.base))  # a folder that holds no adapter
    desk.ask("good", shelf.served("base"))

    desk.run()

    assert desk.finished == ["good"]
    (failed,) = [message for message in desk.said if isinstance(message, Failed)]
    assert (failed.id, failed.status, failed.param) == ("bad", 422, "model")


def test_a_fault_while_a_model_is_loaded_ends_no_other_request(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    desk.ask("before", shelf.served("base"))
    load = LoadedModels.load

    def broken(self: LoadedModels, served: ServedModel, *in_use: Any) -> Base:
        if served.digest == "one":
            raise ZeroDivisionError
        return load(self, served, *in_use)

    monkeypatch.setattr(LoadedModels, "load", broken)
    desk.ask("bad", shelf.served("one", shelf.one))
    desk.run()

    assert desk.finished == ["before"]
    (failed,) = [message for message in desk.said if isinstance(message, Failed)]
    assert (failed.id, failed.status) == ("bad", 500)


def snapshot(tokens: int) -> Snapshot:
    """16 bytes a token."""
    return [(torch.zeros(1, tokens, 2), torch.zeros(1, tokens, 2))]


def test_the_longest_common_prefix_of_the_same_model_is_found() -> None:
    cache = PrefixCache(budget=10_000)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", [*range(10), *range(50, 70)], snapshot(30))
    cache.store("n", list(range(40)), snapshot(40))

    found = cache.match("m", [*range(15), 99])

    assert found is not None
    assert found.length == 15
    assert cache.match("m", [99]) is None
    assert cache.match("other", list(range(20))) is None


def test_a_sequence_replaces_the_one_it_extends() -> None:
    cache = PrefixCache(budget=10_000)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", list(range(35)), snapshot(35))

    assert cache.num_bytes == 35 * 16
    assert not cache.worth_storing("m", list(range(38)))
    assert cache.worth_storing("m", list(range(60)))


def test_what_is_beyond_the_budget_by_itself_drops_nobody() -> None:
    cache = PrefixCache(budget=30 * 16)
    cache.store("m", list(range(20)), snapshot(20))
    cache.store("m", list(range(100, 140)), snapshot(40))

    assert cache.num_bytes == 20 * 16
    assert cache.match("m", list(range(20)))


def test_a_text_takes_the_room_of_its_tokens(shelf: Shelf) -> None:
    text = "Claim: The Danube flows into the Black Sea. " * 5
    tokens = len(Tokenizer.from_file(str(shelf.base / "tokenizer.json")).encode(text).ids)
    assert tokens + 6 <= 256 < len(text) + 50
    desk = Desk(kv_bytes=2 * 256 * 512)  # as above
    for name in ("one", "two"):
        sampling = SamplingParams(max_tokens=min(50, 256 - tokens), temperature=0, ignore_eos=True)
        desk.scheduler.add(Generate(id=name, model=shelf.served("base"), prompt=text, sampling=sampling))
        while desk.scheduler.is_loading:
            desk.scheduler.finish_loads()
    for _ in range(3):
        desk.scheduler.step()

    assert desk.scheduler.stats.running == 2


def test_the_budget_drops_the_least_recently_used() -> None:
    cache = PrefixCache(budget=50 * 16)
    cache.store("m", [1] * 20, snapshot(20))
    cache.store("m", [2] * 20, snapshot(20))
    cache.match("m", [1] * 5)
    cache.store("m", [3] * 20, snapshot(20))

    assert cache.num_bytes == 40 * 16
    assert cache.match("m", [2] * 20) is None
    assert cache.match("m", [1] * 20) is not None


def test_a_character_appears_with_its_last_byte(shelf: Shelf) -> None:
    tokenizer = Tokenizer.from_file(str(shelf.base / "tokenizer.json"))
    ids = tokenizer.encode("né €!").ids
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("The ").ids, skip_special=True)

    pieces = [detokenizer.push(token) for token in ids]

    assert "".join(pieces) == "né €!"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_in_the_end(shelf: Shelf) -> None:
    tokenizer = Tokenizer.from_file(str(shelf.base / "tokenizer.json"))
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
