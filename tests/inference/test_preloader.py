"""Models that will probably be requested are preloaded. A preload delays no request and evicts no model."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.composition import Services
from app.domain.ledger import Unavailable
from tests.api.conftest import lease, make_adapter
from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from tests.inference.test_scheduler import SchedulerHarness
from tests.waiting import until
from worker.inference.model.memory_use import PROCESS_BYTES, base_bytes
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import FixedReservation
from worker.inference.server.model_resolver import PublishedResolver


@pytest.fixture(scope="module")
def reservation() -> FixedReservation:
    return FixedReservation()


@pytest.fixture(scope="module")
def server(tiny: TinyModels, reservation: FixedReservation) -> Iterator[Server]:
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE), reservation, expected=("one", "base")) as running:
        yield running


def loaded(server: Server) -> tuple[float, float]:
    """(number of loaded bases, number of loaded adapters)."""
    return server.metric("veritune:loaded_bases"), server.metric("veritune:loaded_adapters")


def test_every_engine_preloads_the_expected_models(server: Server, reservation: FixedReservation) -> None:
    until(lambda: loaded(server) == (1, 1))

    reservation.unavailable = Unavailable("inference is suspended while a job trains (job_1)", 1_000.0)
    until(lambda: not reservation.is_held)
    assert loaded(server) == (0, 0)
    reservation.unavailable = None

    until(lambda: loaded(server) == (1, 1))
    assert server.metric("veritune:prefills_total") == 0


def test_an_engine_that_follows_a_crashed_one_gets_no_preload_hints(server: Server) -> None:
    until(lambda: loaded(server) == (1, 1))
    pid = server.service.engine.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.service.engine.pid not in (None, pid))
    server.wait_until_ready()

    assert server.service.engine.crashed_recently
    server.stable_metrics("veritune:loaded_bases")
    assert loaded(server) == (0, 0)
    assert server.ids(model="one")


def test_requests_go_before_preloads(tiny: TinyModels) -> None:
    harness = SchedulerHarness()
    harness.scheduler.preload(tiny.served("two", tiny.two))
    harness.add_and_load("requested", tiny.served("one", tiny.one))

    while not harness.finished:
        assert harness.scheduler.stats.adapters == 1
        harness.scheduler.step()
    harness.run()

    assert harness.scheduler.stats.adapters == 2


def test_a_preload_evicts_nothing(tiny: TinyModels) -> None:
    requested, preloaded = tiny.served("base"), tiny.served("other", base_digest="other")
    size = base_bytes(requested, torch.device("cpu"), torch.float32)
    harness = SchedulerHarness(
        memory_bytes=PROCESS_BYTES["cpu"] + size + (1 << 17), kv_bytes=1 << 17, prefix_cache_bytes=0
    )
    harness.scheduler.preload(requested)
    harness.scheduler.preload(preloaded)
    harness.run()

    assert harness.scheduler.stats.bases == 1
    assert harness.models.batch_key(requested)  # the first one is still loaded
    harness.add_and_load("requested after all", preloaded)
    harness.run()
    assert harness.finished == ["requested after all"]


def test_a_preload_that_fails_does_no_harm(tiny: TinyModels, tmp_path: Path) -> None:
    harness = SchedulerHarness()
    harness.scheduler.preload(tiny.served("gone", tmp_path / "gone"))
    harness.add_and_load("other", tiny.served("one", tiny.one))

    harness.run()

    assert harness.finished == ["other"]


def test_the_default_adapter_and_the_newest_jobs_base_are_preloaded(
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

    services.jobs.submit(
        {"dataset": dataset, "adapter": None, "quantization": None}
    )  # full fine-tuning: its base will be its own
    assert resolver.models_to_preload() == [resolver.resolve(adapter.digest)]
