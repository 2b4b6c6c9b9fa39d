"""Inference's reservation in a real ledger: reserved, renewed in time, released for a job, and reserved again."""

import time
from collections.abc import Iterator

import pytest

from app.composition import Services, compose
from app.domain.ledger import Tenant
from worker.device import describe_device
from worker.inference.__main__ import build_inference_app
from worker.inference.server.device_reservation import LedgerReservation

GB = 10**9


@pytest.fixture
def deployment(services: Services) -> Iterator[Services]:
    settings = services.settings.model_copy(update={"inference_memory": GB, "device_policy": "yield"})
    composed = compose(settings)
    yield composed
    composed.close()


def reserved(services: Services) -> dict[Tenant, int]:
    return {one.tenant: one.bytes for one in services.ledger.by_host().get(services.settings.host_name, ())}


def test_it_reserves_the_setting_or_half_of_the_device(services: Services, deployment: Services) -> None:
    assert LedgerReservation(deployment).bytes == GB
    assert LedgerReservation(services).bytes == describe_device(()).bytes // 2


def test_the_engine_gets_the_deployments_settings(services: Services) -> None:
    settings = {"inference_max_batch": 3, "inference_dtype": "float32", "inference_memory": GB}
    engine = build_inference_app(services.settings.model_copy(update=settings)).state.service.settings.engine
    assert (engine.max_batch, engine.dtype, engine.memory_bytes) == (3, "float32", GB)


def test_it_is_released_for_a_job_and_reserved_again_afterwards(deployment: Services) -> None:
    reservation, host = LedgerReservation(deployment), deployment.settings.host_name
    assert reservation.renew() is None
    assert reserved(deployment) == {Tenant.INFERENCE: GB}
    deployment.ledger.reserve_for_training(host, "trainer", "job_1", GB, 10 * GB)
    unavailable = reservation.renew()
    assert unavailable is not None
    assert "job_1" in unavailable.reason
    assert reserved(deployment) == {Tenant.INFERENCE: GB, Tenant.TRAINING: GB}  # until its engine has ended
    reservation.release()
    assert reservation.renew() is not None
    assert reserved(deployment) == {Tenant.TRAINING: GB}
    deployment.ledger.release(host, "trainer")
    assert reservation.renew() is None
    assert reserved(deployment) == {Tenant.INFERENCE: GB}


def test_a_server_takes_over_the_reservation_of_a_killed_one(deployment: Services) -> None:
    assert [LedgerReservation(deployment).renew() for _ in range(2)] == [None, None]
    assert len(deployment.ledger.by_host()[deployment.settings.host_name]) == 1


def test_it_renews_in_time(deployment: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment.ledger, "inference_lease", 0.8)
    reservation = LedgerReservation(deployment)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert reservation.renew() is None
        assert reserved(deployment) == {Tenant.INFERENCE: GB}
        time.sleep(0.1)
