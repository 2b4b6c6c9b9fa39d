"""Bases are read beside those who are answered, and take turns where they do not fit together."""

from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from time import sleep

import pytest
import torch

from tests.inference.conftest import Shelf
from tests.inference.test_scheduler import Desk
from tests.waiting import until
from worker.inference.ipc import EngineSettings, Failed
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, base_bytes
from worker.inference.sampling_params import ServedModel


class Gated(LoadedModels):
    """Reads a base once its gate is open, and notes which."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.gate = Event()
        self.read_bases: list[str] = []

    def read_base(self, served: ServedModel) -> AdaptedBase:
        assert self.gate.wait(60)
        self.read_bases.append(served.base_digest)
        return super().read_base(served)


class Gatehouse(Desk):
    """A desk whose gate is open at first."""

    models: Gated

    def __init__(self, **settings: int) -> None:
        super().__init__(Gated, **settings)
        self.models.gate.set()

    def work(self) -> None:
        """As long as there is something to do without waiting."""
        while self.scheduler.has_work:
            self.scheduler.step()


@pytest.fixture
def late(shelf: Shelf) -> ServedModel:
    """Another base, by its digest."""
    return shelf.served("late", base_digest="late")


def test_others_are_answered_while_a_base_is_read(shelf: Shelf, late: ServedModel) -> None:
    desk = Gatehouse()
    desk.ask("first", shelf.served("base"))
    desk.models.gate.clear()
    desk.hand_in("waits", late)
    desk.hand_in("waits too", late)
    for number in range(3):
        desk.hand_in(f"goes on {number}", shelf.served("one", shelf.one))

    desk.work()

    assert set(desk.finished) == {"first", "goes on 0", "goes on 1", "goes on 2"}
    assert desk.scheduler.stats.waiting == 2
    desk.models.gate.set()
    desk.run()
    assert set(desk.finished[4:]) == {"waits", "waits too"}
    assert desk.models.read_bases == ["base", "late"]


def test_whoever_gives_up_meanwhile_is_not_answered(shelf: Shelf, late: ServedModel) -> None:
    desk = Gatehouse()
    desk.models.gate.clear()
    desk.hand_in("gives up", late)
    desk.hand_in("waits", late)
    desk.scheduler.cancel("gives up")
    desk.models.gate.set()

    desk.run()

    assert desk.finished == ["waits"]
    assert desk.scheduler.stats.waiting == 0


def test_a_base_that_cannot_be_read_is_told_to_all_who_wait_for_it(shelf: Shelf, tmp_path: Path) -> None:
    desk = Gatehouse()
    desk.models.gate.clear()
    torn = shelf.served("torn", base_digest="torn").model_copy(update={"base_path": str(tmp_path)})
    for name in ("one", "two"):
        desk.hand_in(name, torn)
    desk.models.gate.set()
    desk.hand_in("other", shelf.served("base"))

    desk.run()

    told = [message for message in desk.said if isinstance(message, Failed)]
    assert [(failed.id, failed.status) for failed in told] == [("one", 422), ("two", 422)]
    assert all("base model torn cannot be loaded" in failed.message for failed in told)
    assert desk.finished == ["other"]
    assert not desk.scheduler.has_work


def test_bases_are_read_one_at_a_time_by_threads_that_end(shelf: Shelf, late: ServedModel) -> None:
    """transformers makes a model under the process's default dtype; and a thread that stays slows the one that answers
    (see `base_loader`)."""
    desk = Gatehouse()
    at_once: list[int] = []
    read = desk.models.read_base

    def counted(served: ServedModel) -> AdaptedBase:
        at_once.append(1)
        try:
            sleep(0.2)
            return read(served)
        finally:
            assert len(at_once) == 1
            at_once.clear()

    desk.models.read_base = counted  # type: ignore[method-assign]
    for number, model in enumerate((shelf.served("base"), late)):
        desk.hand_in(f"{number}", model)
    assert sum(thread.name == "base-loader" for thread in enumerate_threads()) == 2

    desk.run()

    assert sorted(desk.finished) == ["0", "1"]
    until(lambda: all(thread.name != "reader" for thread in enumerate_threads()))


def one_base(shelf: Shelf) -> Gatehouse:
    """With memory for one base at a time."""
    size = base_bytes(shelf.served("base"), torch.device("cpu"), torch.float32)
    memory = PROCESS_BYTES["cpu"] + 2 * size - 1 + (1 << 17)
    return Gatehouse(memory_bytes=memory, kv_bytes=1 << 17, prefix_cache_bytes=0)


def test_bases_that_do_not_fit_together_are_read_once_for_all_who_wait(shelf: Shelf, late: ServedModel) -> None:
    desk = one_base(shelf)
    for number in range(6):
        desk.hand_in(f"base {number}", shelf.served("base"))
        desk.hand_in(f"late {number}", late)

    desk.run()

    assert len(desk.finished) == 12
    assert desk.models.read_bases == ["base", "late", "base"]


def test_a_crowd_over_one_base_does_not_starve_another(shelf: Shelf, late: ServedModel) -> None:
    desk = one_base(shelf)
    desk.ask("crowd", shelf.served("base"))
    for number in range(40):
        desk.ask(f"crowd {number}", shelf.served("base"))
    for _ in range(3):
        desk.scheduler.step()  # the first of the crowd are being answered
    desk.hand_in("single", late)
    for number in range(40, 50):
        desk.hand_in(f"crowd {number}", shelf.served("base"))

    desk.run()

    assert len(desk.finished) == 52
    assert desk.finished.index("single") <= 16
