"""Doorbells: each kind delivers a ring to its listener. An unavailable broker is no error."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.contrib.testing.worker import start_worker

from app.cli.broker import broker_answers, broker_command
from app.domain.specs import JobKind
from app.queue import CeleryDoorbell, Doorbell, MemoryDoorbell
from app.queue.celery import TASK, celery_app


@pytest.fixture(scope="module")
def socket() -> Iterator[Path]:
    """A real broker on a socket of its own."""
    with tempfile.TemporaryDirectory(prefix="vt-") as directory:
        path = Path(directory) / "redis.sock"
        process = subprocess.Popen(broker_command(path), stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while not broker_answers(path):
            assert time.monotonic() < until
            time.sleep(0.02)
        yield path
        process.terminate()
        process.wait(10)


@pytest.fixture(params=["memory", "celery"])
def connected(request: pytest.FixtureRequest) -> Iterator[tuple[Doorbell, list[str]]]:
    """(a doorbell, the ids of the jobs that it was rung for)."""
    rings: list[str] = []
    if request.param == "memory":
        memory = MemoryDoorbell()
        memory.listen(lambda job_id, kind: rings.append(job_id))
        yield memory, rings
        return
    application = celery_app(f"redis+socket://{request.getfixturevalue('socket')}")

    @application.task(name=TASK)  # type: ignore[untyped-decorator]
    def work(job_id: str) -> None:
        rings.append(job_id)

    with start_worker(application, pool="solo", perform_ping_check=False, shutdown_timeout=20):
        yield CeleryDoorbell(application), rings
    application.close()


def test_a_ring_is_received(connected: tuple[Doorbell, list[str]]) -> None:
    bell, rings = connected
    assert bell.ring("job_1", JobKind.TRAIN)
    until = time.monotonic() + 10
    while not rings and time.monotonic() < until:
        time.sleep(0.02)
    assert rings == ["job_1"]


def test_a_missing_broker_is_no_error(tmp_path: Path) -> None:
    assert not CeleryDoorbell(celery_app(f"redis+socket://{tmp_path}/nobody.sock")).ring("job_1", JobKind.TRAIN)
    assert not MemoryDoorbell().ring("job_1", JobKind.TRAIN)
