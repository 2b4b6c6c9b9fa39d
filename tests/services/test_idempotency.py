"""Idempotency keys: the work of a key is done once, also if the process that began it was killed."""

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from app.composition import Services
from app.domain.errors import ConflictError
from app.services.idempotency import HEARTBEATS_PER_LEASE, Idempotency
from tests.conftest import ROOT

ROUTE, KEY, BODY = "POST /somewhere", "one", b"a body"
LEASE = 1.2

DIES = f"""
import os, sys
from app.db import Database
from app.services.idempotency import Idempotency

def work():
    os._exit(9)

Idempotency(Database(sys.argv[1])).run_once({ROUTE!r}, {KEY!r}, {BODY!r}, work)
"""


class Work:
    """Work that takes some seconds and counts its runs."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.done = 0

    def __call__(self) -> tuple[int, dict[str, Any]]:
        self.done += 1
        time.sleep(self.seconds)
        return 200, {"done": self.done}


@pytest.fixture
def patient(services: Services) -> Idempotency:
    return services.idempotency


@pytest.fixture
def hasty(services: Services) -> Idempotency:
    """Counts a process as lost after LEASE seconds without a heartbeat."""
    return Idempotency(services.database, lease_seconds=LEASE)


@pytest.fixture
def dead(services: Services) -> None:
    """A process began the request and was killed."""
    died = subprocess.run([sys.executable, "-c", DIES, services.settings.database], check=False, cwd=ROOT)
    assert died.returncode == 9


@pytest.mark.usefixtures("dead")
def test_a_key_whose_process_died_is_taken_over_after_a_while(patient: Idempotency, hasty: Idempotency) -> None:
    work = Work()
    with pytest.raises(ConflictError, match="still under way"):
        patient.run_once(ROUTE, KEY, BODY, work)
    assert work.done == 0
    time.sleep(LEASE)
    assert hasty.run_once(ROUTE, KEY, BODY, work) == (200, {"done": 1})
    assert patient.run_once(ROUTE, KEY, BODY, work) == (200, {"done": 1})


@pytest.mark.usefixtures("dead")
def test_several_requests_that_take_over_a_key_do_the_work_once(hasty: Idempotency) -> None:
    work, ready = Work(1.5 * LEASE), threading.Barrier(6)
    refused: list[str] = []
    time.sleep(LEASE)

    def ask() -> None:
        ready.wait()
        try:
            hasty.run_once(ROUTE, KEY, BODY, work)
        except ConflictError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (work.done, refused) == (1, ["request_under_way"] * 5)


def test_a_long_request_with_heartbeats_keeps_its_key(hasty: Idempotency) -> None:
    work = Work(3 * LEASE)
    first = threading.Thread(target=hasty.run_once, args=(ROUTE, KEY, BODY, work))
    first.start()
    while first.is_alive():
        time.sleep(LEASE / HEARTBEATS_PER_LEASE)
        if first.is_alive() and work.done:
            with pytest.raises(ConflictError, match="still under way"):
                hasty.run_once(ROUTE, KEY, BODY, Work())
            time.sleep(LEASE)
    assert hasty.run_once(ROUTE, KEY, BODY, work) == (200, {"done": 1})


def test_a_request_that_lost_its_key_changes_nothing(services: Services) -> None:
    def acquire(lease_seconds: float) -> float | None:
        with services.database.write() as unit:
            return unit.keys.acquire(ROUTE, KEY, "body", lease_seconds)

    zombie = acquire(60.0)
    assert zombie is not None
    assert acquire(60.0) is None
    time.sleep(0.01)
    heir = acquire(0.0)
    assert heir is not None
    with services.database.write() as unit:
        assert unit.keys.renew(ROUTE, KEY, zombie) is None
        unit.keys.save_answer(ROUTE, KEY, zombie, 200, {"by": "zombie"})
        unit.keys.release(ROUTE, KEY, zombie)
        unit.keys.save_answer(ROUTE, KEY, heir, 200, {"by": "heir"})
    assert acquire(0.0) is None
    with services.database.read() as unit:
        row = unit.keys.get(ROUTE, KEY)
    assert row is not None
    assert row.response == {"by": "heir"}


def test_a_failed_request_releases_its_key_after_any_number_of_heartbeats(hasty: Idempotency) -> None:
    def fails() -> tuple[int, dict[str, Any]]:
        time.sleep(LEASE / 2)
        raise ConflictError("not now")

    with pytest.raises(ConflictError, match="not now"):
        hasty.run_once(ROUTE, KEY, BODY, fails)
    assert hasty.run_once(ROUTE, KEY, BODY, Work()) == (200, {"done": 1})
