"""The engine's place in a real ledger: reserved, renewed in time, given up for a job, and taken again."""

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
    told = services.settings.model_copy(update={"inference_memory": GB, "device_policy": "yield"})
    composed = compose(told)
    yield composed
    composed.close()


def reserved(services: Services) -> dict[Tenant, int]:
    return {one.tenant: one.bytes for one in services.ledger.by_host().get(services.settings.host_name, ())}


def test_it_reserves_what_the_operator_says_else_half(services: Services, deployment: Services) -> None:
    assert LedgerReservation(deployment).bytes == GB
    assert LedgerReservation(services).bytes == describe_device(()).bytes // 2


def test_the_engine_is_told_what_the_deployment_sets(services: Services) -> None:
    told = {"inference_max_batch": 3, "inference_dtype": "float32", "inference_memory": GB}
    engine = build_inference_app(services.settings.model_copy(update=told)).state.service.settings.engine
    assert (engine.max_batch, engine.dtype, engine.memory_bytes) == (3, "float32", GB)


def test_it_stays_until_a_job_comes_and_comes_back_behind_it(deployment: Services) -> None:
    reservation, host = LedgerReservation(deployment), deployment.settings.host_name
    assert reservation.renew() is None
    assert reserved(deployment) == {Tenant.INFERENCE: GB}
    deployment.ledger.reserve_for_training(host, "trainer", "job_1", GB, 10 * GB)
    absence = reservation.renew()
    assert absence is not None
    assert "job_1" in absence.reason
    assert reserved(deployment) == {Tenant.INFERENCE: GB, Tenant.TRAINING: GB}  # until its engine has ended
    reservation.release()
    assert reservation.renew() is not None
    assert reserved(deployment) == {Tenant.TRAINING: GB}
    deployment.ledger.release(host, "trainer")
    assert reservation.renew() is None
    assert reserved(deployment) == {Tenant.INFERENCE: GB}


def test_one_that_starts_after_another_was_killed_goes_on_with_its_place(deployment: Services) -> None:
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
