"""`veritune worker-health`: healthy is a host each of whose queues has a worker whose row in the database is fresh."""

from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from app.cli.commands import application
from app.composition import Services
from app.db.tables import DeviceRow
from app.domain.devices import DeviceDescription


@pytest.fixture(autouse=True)
def environment(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERITUNE_HOME", str(services.settings.home_path))
    monkeypatch.setenv("VERITUNE_DEVICE_NAME", "host")
    monkeypatch.setenv("VERITUNE_WORKER_QUEUES", "gpu")


def report(services: Services, name: str, seconds_ago: float = 0.0) -> None:
    queues = tuple(name.partition("/")[2].split("+"))
    description = DeviceDescription(type="cpu", model="a CPU", bytes=1, cores=1, queues=queues)
    services.devices.report(name, description)
    with services.database.write() as unit:
        row = unit.session.get(DeviceRow, name)
        assert row is not None
        row.last_seen = datetime.now(UTC) - timedelta(seconds=seconds_ago)


def health() -> int:
    return CliRunner().invoke(application, ["worker-health"]).exit_code


def test_a_worker_that_never_reported_is_not_healthy(services: Services) -> None:
    assert health() == 1


def test_a_worker_that_reported_just_now_is_healthy(services: Services) -> None:
    report(services, "host/gpu")
    assert health() == 0


def test_a_worker_that_has_fallen_silent_is_not_healthy(services: Services) -> None:
    report(services, "host/gpu", seconds_ago=120)
    assert health() == 1


def test_another_workers_report_is_not_its_own(services: Services) -> None:
    report(services, "host/cpu")
    report(services, "other/gpu")
    assert health() == 1


def test_several_workers_of_a_host_serve_its_queues_together(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERITUNE_WORKER_QUEUES", "gpu,cpu")
    report(services, "host/gpu")
    assert health() == 1
    report(services, "host/cpu")
    assert health() == 0
    report(services, "host/gpu", seconds_ago=120)
    assert health() == 1
    report(services, "host/gpu+cpu")
    assert health() == 0


def test_a_worker_whose_database_is_away_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERITUNE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none?connect_timeout=2")
    assert health() == 1
