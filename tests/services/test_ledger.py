"""The device ledger, on both databases: which tenant gets bytes, which one waits, and what a killed process leaves."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.composition import Services
from app.domain.devices import DeviceDescription
from app.domain.ledger import OwnedReservation, Policy, PolicySetting, Reservation, Tenant, TrainingGrant
from app.services.attempts import Attempts
from app.services.ledger import Ledger

GB = 10**9
HOST = "host"
NO_TENANT: frozenset[Tenant] = frozenset()
INFERENCE = frozenset({Tenant.INFERENCE})
TRAINING = frozenset({Tenant.TRAINING})


def ledger_of(
    services: Services,
    setting: PolicySetting = "auto",
    inference_memory: int | None = None,
    lease_seconds: float = 30.0,
) -> Ledger:
    return Ledger(services.database, setting, inference_memory, lease_seconds)


@pytest.fixture
def ledger(services: Services) -> Ledger:
    return services.ledger


def train(ledger: Ledger, owner: str, wanted: int | None, device: int = 10 * GB) -> TrainingGrant:
    return ledger.reserve_for_training(HOST, owner, f"job_{owner}", wanted, device)


def reserved(ledger: Ledger) -> dict[str, int]:
    return {one.job_id or one.tenant.value: one.bytes for one in ledger.by_host().get(HOST, ())}


def test_a_reservation_has_its_estimated_end_from_the_first_moment(ledger: Ledger) -> None:
    held = ledger.reserve_for_training(HOST, "a", "job_a", 9 * GB, 10 * GB, 60.0).reservation
    assert held is not None
    (reservation,) = ledger.by_host()[HOST]
    assert reservation.ends_in == pytest.approx(60.0, abs=2.0)
    unavailable = ledger.reserve_for_inference(HOST, "server", 4 * GB)
    assert unavailable is not None
    assert unavailable.retry_after == pytest.approx(60.0, abs=2.0)


def test_both_tenants_share_the_device_if_both_fit(ledger: Ledger) -> None:
    assert ledger.reserve_for_inference(HOST, "server", 4 * GB) is None
    grant = train(ledger, "a", 6 * GB)
    assert (grant.policy, grant.blocked_by) == (Policy.SHARE, NO_TENANT)
    assert ledger.inference_unavailable(HOST) is None
    assert ledger.reserve_for_inference(HOST, "server", 4 * GB) is None
    assert reserved(ledger) == {"inference": 4 * GB, "job_a": 6 * GB}


def test_inference_is_suspended_if_both_do_not_fit_and_the_job_waits_for_its_release(ledger: Ledger) -> None:
    ledger.reserve_for_inference(HOST, "server", 4 * GB)
    grant = train(ledger, "a", 6 * GB + 1)
    assert (grant.policy, grant.blocked_by) == (Policy.YIELD, INFERENCE)
    unavailable = ledger.inference_unavailable(HOST)
    assert unavailable is not None
    assert "job_a" in unavailable.reason
    assert ledger.reserve_for_inference(HOST, "server", 4 * GB) == unavailable
    assert train(ledger, "a", 6 * GB + 1).blocked_by == INFERENCE
    ledger.release(HOST, "server")
    assert train(ledger, "a", 6 * GB + 1).blocked_by == NO_TENANT
    assert ledger.reserve_for_inference(HOST, "server", 4 * GB) == unavailable
    ledger.release(HOST, "a")
    assert ledger.reserve_for_inference(HOST, "server", 4 * GB) is None
    assert reserved(ledger) == {"inference": 4 * GB}


def test_inference_that_is_not_running_is_counted_with_the_bytes_it_will_reserve(
    services: Services, ledger: Ledger
) -> None:
    assert train(ledger, "a", 5 * GB).policy is Policy.SHARE
    assert train(ledger, "a", 5 * GB + 1).policy is Policy.YIELD
    modest = ledger_of(services, inference_memory=GB)
    assert train(modest, "a", 9 * GB).policy is Policy.SHARE


def test_a_job_of_unknown_size_reserves_the_whole_device(ledger: Ledger) -> None:
    ledger.reserve_for_inference(HOST, "server", GB)
    assert train(ledger, "a", None).policy is Policy.YIELD
    assert reserved(ledger)["job_a"] == 10 * GB


def test_a_plan_larger_than_the_device_reserves_the_device(ledger: Ledger) -> None:
    grant = train(ledger, "a", 11 * GB)
    assert grant.blocked_by == NO_TENANT
    assert reserved(ledger) == {"job_a": 10 * GB}


@pytest.mark.parametrize(("setting", "blocked_by"), [("yield", NO_TENANT), ("exclusive", TRAINING)])
def test_the_policies_yield_and_exclusive_suspend_inference(
    services: Services, setting: PolicySetting, blocked_by: frozenset[Tenant]
) -> None:
    ledger = ledger_of(services, setting)
    ledger.reserve_for_inference(HOST, "server", GB)
    assert train(ledger, "a", GB).blocked_by == INFERENCE
    ledger.release(HOST, "server")
    grant = train(ledger, "a", GB)
    assert (grant.policy.value, grant.blocked_by) == (setting, NO_TENANT)
    assert train(ledger, "b", GB).blocked_by == blocked_by


def test_a_second_job_waits_for_the_first_and_blocks_no_tenant_meanwhile(ledger: Ledger) -> None:
    train(ledger, "a", 5 * GB)
    ledger.reserve_for_inference(HOST, "server", 4 * GB)
    grant = train(ledger, "b", 6 * GB)
    assert (grant.reservation, grant.blocked_by) == (None, TRAINING)
    assert ledger.inference_unavailable(HOST) is None
    ledger.release(HOST, "a")
    assert train(ledger, "b", 6 * GB).blocked_by == NO_TENANT


def test_the_same_bytes_are_reserved_only_once(ledger: Ledger) -> None:
    start = threading.Barrier(6)

    def ask(number: int) -> bool:
        start.wait(10)
        return train(ledger, str(number), 4 * GB).reservation is not None

    with ThreadPoolExecutor(6) as pool:
        granted = list(pool.map(ask, range(6)))
    assert sum(granted) == 2
    assert sum(reserved(ledger).values()) == 8 * GB


def test_devices_of_other_hosts_are_independent(ledger: Ledger) -> None:
    ledger.reserve_for_inference("another", "server", 4 * GB)
    train(ledger, "a", 9 * GB)
    assert ledger.inference_unavailable("another") is None
    assert ledger.reserve_for_training("third", "a", "job_3", 9 * GB, 10 * GB).blocked_by == NO_TENANT
    assert ledger.inference_is_suspended()


def test_the_reservation_of_a_killed_process_expires(services: Services) -> None:
    hasty = ledger_of(services, lease_seconds=0.3)
    began = time.monotonic()
    train(hasty, "a", None)
    assert hasty.reserve_for_inference(HOST, "server", GB) is not None
    while hasty.reserve_for_inference(HOST, "server", GB) is not None:
        assert time.monotonic() - began < 2
        time.sleep(0.02)
    assert time.monotonic() - began > 0.25
    assert reserved(hasty) == {"inference": GB}
    assert not hasty.inference_is_suspended()


def test_inference_keeps_its_reservation_while_it_drains(services: Services) -> None:
    """It does not renew while it drains. With the shortest lease, a job would start before the engine has ended."""
    hasty = ledger_of(services, lease_seconds=0.1)
    hasty.reserve_for_inference(HOST, "server", GB)
    time.sleep(0.3)
    assert train(hasty, "a", None).blocked_by == INFERENCE


def test_the_end_of_a_job_is_given_in_seconds_from_now(ledger: Ledger) -> None:
    held = train(ledger, "a", None).reservation
    assert held is not None

    def left() -> float | None:
        unavailable = ledger.inference_unavailable(HOST)
        assert unavailable is not None
        return unavailable.retry_after

    assert left() is None
    ledger.set_expected_end(held, 100.0)
    time.sleep(0.3)
    assert 98 < (left() or 0) < 99.8
    train(ledger, "a", None)
    assert 98 < (left() or 0) < 99.8  # asking again does not forget it
    ledger.set_expected_end(held, -5.0)
    assert left() == 0


def test_a_heartbeat_renews_the_reservation_and_restores_an_expired_one(services: Services, upload: Path) -> None:
    hasty = ledger_of(services, lease_seconds=0.5)
    attempts = Attempts(services.database, services.blobs, services.plans, 0.5)
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id
    services.jobs.submit({"dataset": dataset})
    leased = attempts.lease(("train",), "a")
    assert leased is not None
    held = train(hasty, "a", GB).reservation
    assert held is not None
    for _ in range(4):
        time.sleep(0.2)
        attempts.renew(leased.lease, held)
        assert reserved(hasty) == {"job_a": GB}
    time.sleep(0.7)
    assert reserved(hasty) == {}
    assert hasty.reserve_for_inference(HOST, "server", GB) is None
    attempts.renew(leased.lease, held)
    assert reserved(hasty) == {"job_a": GB, "inference": GB}


def test_inference_that_needs_more_than_was_reserved_stays_suspended(services: Services, ledger: Ledger) -> None:
    described = DeviceDescription(type="cpu", model="a cpu", bytes=10 * GB, cores=2, queues=("gpu",))
    services.devices.report(f"{HOST}/gpu", described)
    assert train(ledger, "a", 5 * GB).policy is Policy.SHARE
    assert ledger.reserve_for_inference(HOST, "server", 6 * GB) is not None
    assert ledger.reserve_for_inference(HOST, "server", 5 * GB) is None


def test_devices_show_the_reserved_bytes_of_each_tenant(services: Services, ledger: Ledger) -> None:
    described = DeviceDescription(type="cpu", model="a cpu", bytes=10 * GB, cores=2, queues=("gpu",))
    services.devices.report(f"{HOST}/gpu", described)
    services.devices.report(f"{HOST}/cpu", described.model_copy(update={"queues": ("cpu",)}))
    services.devices.report(f"{HOST}s/gpu", described)
    ledger.reserve_for_inference(HOST, "server", 4 * GB)
    train(ledger, "a", 5 * GB)
    runner, trainer, other = services.devices.list_devices_with_reservations()
    assert (runner.reservations, other.reservations) == ((), ())
    assert set(trainer.reservations) == {
        Reservation(tenant=Tenant.INFERENCE, bytes=4 * GB),
        Reservation(tenant=Tenant.TRAINING, bytes=5 * GB, policy=Policy.SHARE, job_id="job_a"),
    }
    assert services.devices.room(trainer.name) == GB
    assert services.devices.room("nobody") is None
    services.devices.report(trainer.name, described.model_copy(update={"type": "gpu"}))
    assert services.devices.room(trainer.name) is None


def test_a_reservation_names_its_owner(ledger: Ledger) -> None:
    held = train(ledger, "a", GB).reservation
    assert held == OwnedReservation(
        HOST, "a", Reservation(tenant=Tenant.TRAINING, bytes=GB, policy=Policy.SHARE, job_id="job_a")
    )
