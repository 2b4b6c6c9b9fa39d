"""Bases are loaded while requests over other bases run. Bases that do not fit together take turns."""

from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from time import sleep

import pytest
import torch

from tests.inference.conftest import TinyModels
from tests.inference.test_scheduler import SchedulerHarness
from tests.waiting import until
from worker.inference.ipc import EngineSettings, Failed
from worker.inference.model.adapters import AdaptedBase
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import PROCESS_BYTES, base_bytes
from worker.inference.sampling_params import ServedModel


class GatedModels(LoadedModels):
    """Reads a base once its gate is open, and records its digest."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.gate = Event()
        self.read_bases: list[str] = []

    def read_base(self, served: ServedModel) -> AdaptedBase:
        assert self.gate.wait(60)
        self.read_bases.append(served.base_digest)
        return super().read_base(served)


class GatedHarness(SchedulerHarness):
    """A harness whose models are read once `models.gate` is open. It is open at first."""

    models: GatedModels

    def __init__(self, **settings: int) -> None:
        super().__init__(GatedModels, **settings)
        self.models.gate.set()

    def run_until_loading(self) -> None:
        """Step until all that is left waits for a base."""
        while self.scheduler.has_work:
            self.scheduler.step()


@pytest.fixture
def late(tiny: TinyModels) -> ServedModel:
    """Another base, by its digest."""
    return tiny.served("late", base_digest="late")


def test_requests_over_other_bases_run_while_a_base_is_loaded(tiny: TinyModels, late: ServedModel) -> None:
    harness = GatedHarness()
    harness.add_and_load("first", tiny.served("base"))
    harness.models.gate.clear()
    harness.add("waits", late)
    harness.add("waits too", late)
    for number in range(3):
        harness.add(f"goes on {number}", tiny.served("one", tiny.one))

    harness.run_until_loading()

    assert set(harness.finished) == {"first", "goes on 0", "goes on 1", "goes on 2"}
    assert harness.scheduler.stats.waiting == 2
    harness.models.gate.set()
    harness.run()
    assert set(harness.finished[4:]) == {"waits", "waits too"}
    assert harness.models.read_bases == ["base", "late"]


def test_a_request_cancelled_while_its_base_loads_is_not_run(tiny: TinyModels, late: ServedModel) -> None:
    harness = GatedHarness()
    harness.models.gate.clear()
    harness.add("cancelled", late)
    harness.add("waits", late)
    harness.scheduler.cancel("cancelled")
    harness.models.gate.set()

    harness.run()

    assert harness.finished == ["waits"]
    assert harness.scheduler.stats.waiting == 0


def test_a_base_that_cannot_be_loaded_fails_all_requests_for_it(tiny: TinyModels, tmp_path: Path) -> None:
    harness = GatedHarness()
    harness.models.gate.clear()
    torn = tiny.served("torn", base_digest="torn").model_copy(update={"base_path": str(tmp_path)})
    for name in ("one", "two"):
        harness.add(name, torn)
    harness.models.gate.set()
    harness.add("other", tiny.served("base"))

    harness.run()

    failures = [message for message in harness.outputs if isinstance(message, Failed)]
    assert [(failed.id, failed.status) for failed in failures] == [("one", 422), ("two", 422)]
    assert all("base model torn cannot be loaded" in failed.message for failed in failures)
    assert harness.finished == ["other"]
    assert not harness.scheduler.has_work


def test_bases_are_loaded_one_at_a_time_by_threads_that_end(tiny: TinyModels, late: ServedModel) -> None:
    """transformers sets the process's default dtype while it creates a model. An idle loader thread would slow the
    scheduler's (see `base_loader`)."""
    harness = GatedHarness()
    reading: list[int] = []
    read = harness.models.read_base

    def counted(served: ServedModel) -> AdaptedBase:
        reading.append(1)
        try:
            sleep(0.2)
            return read(served)
        finally:
            assert len(reading) == 1
            reading.clear()

    harness.models.read_base = counted  # type: ignore[method-assign]
    for number, model in enumerate((tiny.served("base"), late)):
        harness.add(f"{number}", model)
    assert sum(thread.name == "base-loader" for thread in enumerate_threads()) == 2

    harness.run()

    assert sorted(harness.finished) == ["0", "1"]
    until(lambda: all(thread.name != "base-loader" for thread in enumerate_threads()))


def one_base(tiny: TinyModels) -> GatedHarness:
    """A harness with memory for one base at a time."""
    size = base_bytes(tiny.served("base"), torch.device("cpu"), torch.float32)
    memory = PROCESS_BYTES["cpu"] + 2 * size - 1 + (1 << 17)
    return GatedHarness(memory_bytes=memory, kv_bytes=1 << 17, prefix_cache_bytes=0)


def test_bases_that_do_not_fit_together_are_loaded_once_for_all_waiting_requests(
    tiny: TinyModels, late: ServedModel
) -> None:
    harness = one_base(tiny)
    for number in range(6):
        harness.add(f"base {number}", tiny.served("base"))
        harness.add(f"late {number}", late)

    harness.run()

    assert len(harness.finished) == 12
    assert harness.models.read_bases == ["base", "late", "base"]


def test_many_requests_over_one_base_do_not_starve_another(tiny: TinyModels, late: ServedModel) -> None:
    harness = one_base(tiny)
    harness.add_and_load("many", tiny.served("base"))
    for number in range(40):
        harness.add_and_load(f"many {number}", tiny.served("base"))
    for _ in range(3):
        harness.scheduler.step()  # the first of the many are running
    harness.add("single", late)
    for number in range(40, 50):
        harness.add(f"many {number}", tiny.served("base"))

    harness.run()

    assert len(harness.finished) == 52
    assert harness.finished.index("single") <= 16
