"""The device ledger, on both databases: who gets bytes, who waits for whom, and what a killed process leaves."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.composition import Services
from app.domain.devices import DeviceDescription
from app.domain.ledger import Held, Policy, Reservation, Standing, Tenant, Wish
from app.services.attempts import Attempts
from app.services.ledger import Ledger

GB = 10**9
HOST = "host"
NOBODY: frozenset[Tenant] = frozenset()
INFERENCE = frozenset({Tenant.INFERENCE})
TRAINING = frozenset({Tenant.TRAINING})


def ledger_of(
    services: Services, wish: Wish = "auto", inference_memory: int | None = None, lease_seconds: float = 30.0
) -> Ledger:
    return Ledger(services.database, wish, inference_memory, lease_seconds)


@pytest.fixture
def ledger(services: Services) -> Ledger:
    return services.ledger


def train(ledger: Ledger, owner: str, wanted: int | None, device: int = 10 * GB) -> Standing:
    return ledger.train(HOST, owner, f"job_{owner}", wanted, device)


def reserved(ledger: Ledger) -> dict[str, int]:
    return {one.job_id or one.tenant.value: one.bytes for one in ledger.by_host().get(HOST, ())}


def test_a_reservation_tells_from_its_first_moment_when_it_should_end(ledger: Ledger) -> None:
    held = ledger.train(HOST, "a", "job_a", 9 * GB, 10 * GB, 60.0).held
    assert held is not None
    (reservation,) = ledger.by_host()[HOST]
    assert reservation.ends_in == pytest.approx(60.0, abs=2.0)
    absence = ledger.serve(HOST, "front", 4 * GB)
    assert absence is not None
    assert absence.seconds == pytest.approx(60.0, abs=2.0)


def test_both_stay_where_both_fit(ledger: Ledger) -> None:
    assert ledger.serve(HOST, "front", 4 * GB) is None
    standing = train(ledger, "a", 6 * GB)
    assert (standing.policy, standing.waits_for) == (Policy.SHARE, NOBODY)
    assert ledger.absence(HOST) is None
    assert ledger.serve(HOST, "front", 4 * GB) is None
    assert reserved(ledger) == {"inference": 4 * GB, "job_a": 6 * GB}


def test_inference_makes_way_where_they_do_not_fit_and_the_job_waits_until_it_has(ledger: Ledger) -> None:
    ledger.serve(HOST, "front", 4 * GB)
    standing = train(ledger, "a", 6 * GB + 1)
    assert (standing.policy, standing.waits_for) == (Policy.YIELD, INFERENCE)
    absence = ledger.absence(HOST)
    assert absence is not None
    assert "job_a" in absence.why
    assert ledger.serve(HOST, "front", 4 * GB) == absence
    assert train(ledger, "a", 6 * GB + 1).waits_for == INFERENCE
    ledger.release(HOST, "front")
    assert train(ledger, "a", 6 * GB + 1).waits_for == NOBODY
    assert ledger.serve(HOST, "front", 4 * GB) == absence
    ledger.release(HOST, "a")
    assert ledger.serve(HOST, "front", 4 * GB) is None
    assert reserved(ledger) == {"inference": 4 * GB}


def test_inference_that_is_away_is_counted_with_what_it_will_want(services: Services, ledger: Ledger) -> None:
    assert train(ledger, "a", 5 * GB).policy is Policy.SHARE
    assert train(ledger, "a", 5 * GB + 1).policy is Policy.YIELD
    modest = ledger_of(services, inference_memory=GB)
    assert train(modest, "a", 9 * GB).policy is Policy.SHARE


def test_what_is_not_known_takes_the_whole_device(ledger: Ledger) -> None:
    ledger.serve(HOST, "front", GB)
    assert train(ledger, "a", None).policy is Policy.YIELD
    assert reserved(ledger)["job_a"] == 10 * GB


def test_a_plan_larger_than_the_device_reserves_the_device(ledger: Ledger) -> None:
    standing = train(ledger, "a", 11 * GB)
    assert standing.waits_for == NOBODY
    assert reserved(ledger) == {"job_a": 10 * GB}


@pytest.mark.parametrize(("wish", "beside"), [("yield", NOBODY), ("exclusive", TRAINING)])
def test_the_operator_may_want_inference_away_and_the_device_for_one_job(
    services: Services, wish: Wish, beside: frozenset[Tenant]
) -> None:
    ledger = ledger_of(services, wish)
    ledger.serve(HOST, "front", GB)
    assert train(ledger, "a", GB).waits_for == INFERENCE
    ledger.release(HOST, "front")
    standing = train(ledger, "a", GB)
    assert (standing.policy.value, standing.waits_for) == (wish, NOBODY)
    assert train(ledger, "b", GB).waits_for == beside


def test_a_second_job_waits_for_the_first_and_keeps_nobody_away_meanwhile(ledger: Ledger) -> None:
    train(ledger, "a", 5 * GB)
    ledger.serve(HOST, "front", 4 * GB)
    standing = train(ledger, "b", 6 * GB)
    assert (standing.held, standing.waits_for) == (None, TRAINING)
    assert ledger.absence(HOST) is None
    ledger.release(HOST, "a")
    assert train(ledger, "b", 6 * GB).waits_for == NOBODY


def test_bytes_that_are_there_once_are_given_once(ledger: Ledger) -> None:
    start = threading.Barrier(6)

    def ask(number: int) -> bool:
        start.wait(10)
        return train(ledger, str(number), 4 * GB).held is not None

    with ThreadPoolExecutor(6) as pool:
        granted = list(pool.map(ask, range(6)))
    assert sum(granted) == 2
    assert sum(reserved(ledger).values()) == 8 * GB


def test_devices_of_other_hosts_are_no_concern(ledger: Ledger) -> None:
    ledger.serve("another", "front", 4 * GB)
    train(ledger, "a", 9 * GB)
    assert ledger.absence("another") is None
    assert ledger.train("third", "a", "job_3", 9 * GB, 10 * GB).waits_for == NOBODY
    assert ledger.makes_way()


def test_what_a_killed_process_had_runs_out(services: Services) -> None:
    hasty = ledger_of(services, lease_seconds=0.3)
    began = time.monotonic()
    train(hasty, "a", None)
    assert hasty.serve(HOST, "front", GB) is not None
    while hasty.serve(HOST, "front", GB) is not None:
        assert time.monotonic() - began < 2
        time.sleep(0.02)
    assert time.monotonic() - began > 0.25
    assert reserved(hasty) == {"inference": GB}
    assert not hasty.makes_way()


def test_inference_is_not_counted_out_while_it_drains(services: Services) -> None:
    """It renews nothing then; with the shortest leases a job would begin beside an engine that still ends."""
    hasty = ledger_of(services, lease_seconds=0.1)
    hasty.serve(HOST, "front", GB)
    time.sleep(0.3)
    assert train(hasty, "a", None).waits_for == INFERENCE


def test_the_end_of_a_job_is_told_in_seconds_from_now(ledger: Ledger) -> None:
    held = train(ledger, "a", None).held
    assert held is not None

    def left() -> float | None:
        absence = ledger.absence(HOST)
        assert absence is not None
        return absence.seconds

    assert left() is None
    ledger.expect(held, 100.0)
    time.sleep(0.3)
    assert 98 < (left() or 0) < 99.8
    train(ledger, "a", None)
    assert 98 < (left() or 0) < 99.8  # asking again does not forget it
    ledger.expect(held, -5.0)
    assert left() == 0


def test_a_heartbeat_renews_the_place_and_takes_it_again_where_it_had_run_out(services: Services, upload: Path) -> None:
    hasty = ledger_of(services, lease_seconds=0.5)
    attempts = Attempts(services.database, services.blobs, services.plans, 0.5)
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id
    services.jobs.submit({"dataset": dataset})
    leased = attempts.lease(("train",), "a")
    assert leased is not None
    held = train(hasty, "a", GB).held
    assert held is not None
    for _ in range(4):
        time.sleep(0.2)
        attempts.renew(leased.lease, held)
        assert reserved(hasty) == {"job_a": GB}
    time.sleep(0.7)
    assert reserved(hasty) == {}
    assert hasty.serve(HOST, "front", GB) is None
    attempts.renew(leased.lease, held)
    assert reserved(hasty) == {"job_a": GB, "inference": GB}


def test_inference_that_wants_more_than_it_was_counted_with_stays_away(services: Services, ledger: Ledger) -> None:
    described = DeviceDescription(type="cpu", model="a cpu", bytes=10 * GB, cores=2, queues=("gpu",))
    services.devices.report(f"{HOST}/gpu", described)
    assert train(ledger, "a", 5 * GB).policy is Policy.SHARE
    assert ledger.serve(HOST, "front", 6 * GB) is not None
    assert ledger.serve(HOST, "front", 5 * GB) is None


def test_devices_show_who_has_how_much_of_them(services: Services, ledger: Ledger) -> None:
    described = DeviceDescription(type="cpu", model="a cpu", bytes=10 * GB, cores=2, queues=("gpu",))
    services.devices.report(f"{HOST}/gpu", described)
    services.devices.report(f"{HOST}/cpu", described.model_copy(update={"queues": ("cpu",)}))
    services.devices.report(f"{HOST}s/gpu", described)
    ledger.serve(HOST, "front", 4 * GB)
    train(ledger, "a", 5 * GB)
    runner, trainer, other = services.devices.shown()
    assert (runner.reservations, other.reservations) == ((), ())
    assert set(trainer.reservations) == {
        Reservation(tenant=Tenant.INFERENCE, bytes=4 * GB),
        Reservation(tenant=Tenant.TRAINING, bytes=5 * GB, policy=Policy.SHARE, job_id="job_a"),
    }
    assert services.devices.room(trainer.name) == GB
    assert services.devices.room("nobody") is None
    services.devices.report(trainer.name, described.model_copy(update={"type": "gpu"}))
    assert services.devices.room(trainer.name) is None


def test_a_held_place_is_its_owners(ledger: Ledger) -> None:
    held = train(ledger, "a", GB).held
    assert held == Held(HOST, "a", Reservation(tenant=Tenant.TRAINING, bytes=GB, policy=Policy.SHARE, job_id="job_a"))
