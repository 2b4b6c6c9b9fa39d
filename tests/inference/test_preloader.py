"""What will probably be asked for is loaded before anybody asks, and never at anybody's cost."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.composition import Services
from app.domain.ledger import Unavailable
from tests.api.conftest import lease, make_adapter
from tests.inference.conftest import ENGINE, Server, Shelf, serving
from tests.inference.test_scheduler import Desk
from tests.waiting import until
from worker.inference.model.memory_use import PROCESS_BYTES, base_bytes
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import FixedReservation
from worker.inference.server.model_resolver import PublishedResolver


@pytest.fixture(scope="module")
def reservation() -> FixedReservation:
    return FixedReservation()


@pytest.fixture(scope="module")
def server(shelf: Shelf, reservation: FixedReservation) -> Iterator[Server]:
    with serving(shelf.table(), ServerSettings(engine=ENGINE), reservation, expected=("one", "base")) as running:
        yield running


def loaded(server: Server) -> tuple[float, float]:
    """How many bases and adapters."""
    return server.metric("veritune:loaded_bases"), server.metric("veritune:loaded_adapters")


def test_every_engine_loads_what_is_expected(server: Server, reservation: FixedReservation) -> None:
    until(lambda: loaded(server) == (1, 1))

    reservation.unavailable = Unavailable("inference makes way for training (job_1)", 1_000.0)
    until(lambda: not reservation.is_held)
    assert loaded(server) == (0, 0)
    reservation.unavailable = None

    until(lambda: loaded(server) == (1, 1))
    assert server.metric("veritune:prefills_total") == 0


def test_an_engine_that_follows_a_dead_one_is_told_nothing(server: Server) -> None:
    until(lambda: loaded(server) == (1, 1))
    pid = server.front.engine.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.front.engine.pid not in (None, pid))
    server.wait_until_ready()

    assert server.front.engine.crashed_recently
    server.settled("veritune:loaded_bases")
    assert loaded(server) == (0, 0)
    assert server.ids(model="one")


def test_whoever_asks_goes_first(shelf: Shelf) -> None:
    desk = Desk()
    desk.scheduler.preload(shelf.served("two", shelf.two))
    desk.ask("asked", shelf.served("one", shelf.one))

    while not desk.finished:
        assert desk.scheduler.stats.adapters == 1
        desk.scheduler.step()
    desk.run()

    assert desk.scheduler.stats.adapters == 2


def test_nothing_goes_to_make_room_for_what_is_expected(shelf: Shelf) -> None:
    asked, guessed = shelf.served("base"), shelf.served("other", base_digest="other")
    size = base_bytes(asked, torch.device("cpu"), torch.float32)
    desk = Desk(memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0)
    desk.scheduler.preload(asked)
    desk.scheduler.preload(guessed)
    desk.run()

    assert desk.scheduler.stats.bases == 1
    assert desk.models.batch_key(asked)  # it is the one that was there
    desk.ask("asked after all", guessed)
    desk.run()
    assert desk.finished == ["asked after all"]


def test_what_cannot_be_loaded_is_no_harm(shelf: Shelf, tmp_path: Path) -> None:
    desk = Desk()
    desk.scheduler.preload(shelf.served("gone", tmp_path / "gone"))
    desk.ask("other", shelf.served("one", shelf.one))

    desk.run()

    assert desk.finished == ["other"]


def test_the_default_adapter_and_the_newest_jobs_base_are_expected(
    services: Services, upload: Path, tmp_path: Path
) -> None:
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id
    resolver = PublishedResolver(services)
    assert resolver.models_to_preload() == []

    services.jobs.submit({"dataset": dataset, "name": "first"})
    (base,) = resolver.models_to_preload()
    assert (base.digest, base.adapter_path) == (base.base_digest, None)

    adapter = services.adapters.get(make_adapter(services, lease(services), tmp_path / "first", "first"))
    assert resolver.models_to_preload() == [resolver.resolve(adapter.digest), base]

    services.jobs.submit({"dataset": dataset, "adapter": None, "quantization": None})  # its base will be its own
    assert resolver.models_to_preload() == [resolver.resolve(adapter.digest)]
