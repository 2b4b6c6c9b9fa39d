"""`kill -9` of every process while a job trains and claims are judged: all of it recovers by itself."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, corpus_jsonl
from tests.e2e.conftest import Deployment, command_of, start, stop

pytestmark = pytest.mark.chaos

VICTIMS = {
    "child": ("worker.training",),
    "trainer": ("-m", "worker"),
    "engine": ("worker.inference.engine",),
    "inference": ("-m", "worker.inference"),
    "api": ("app.cli", "api"),
    "broker": ("valkey-server",),
}
SPEC = {
    "dataset": "demo",
    "trainer": {"train_steps": 40, "effective_batch_size": 4, "steps_per_checkpoint": 4},
    "adapter": {"type": "lora", "r": 4},
}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    running = start(tmp_path / "home")
    yield running
    assert stop(running) == []


def kill(deployment: Deployment, name: str) -> None:
    """SIGKILL the process of this name; a worker's two processes are told apart by their queue."""
    words = VICTIMS[name]
    for process in deployment.processes():
        line = command_of(process)
        matches = any(words == tuple(line[i : i + len(words)]) for i in range(len(line))) or words[0] in " ".join(
            line[:1]
        )
        if matches and (name != "trainer" or process.environ().get("VERITUNE_WORKER_QUEUES") == "gpu"):
            process.kill()
            return
    raise AssertionError(f"no {name} to kill: {[command_of(p) for p in deployment.processes()]}")


def patiently(ask: Callable[[], Any], seconds: float = 90) -> Any:
    """What `ask` gives once the service is there again: a connection that breaks is the kill's own mark."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (httpx.TransportError, AssertionError):
            assert time.monotonic() < until
            time.sleep(0.3)


def test_everything_recovers_and_the_job_succeeds(deployment: Deployment) -> None:
    deployment.post(
        "/datasets", files={"file": ("t.jsonl", (ROOT / "examples/train.jsonl").read_bytes())}, data={"name": "demo"}
    )
    deployment.post("/corpora", files={"file": ("c.jsonl", corpus_jsonl())}, data={"name": "demo"})
    job = deployment.post("/jobs", json=SPEC)["id"]
    over = threading.Event()
    statuses: list[int] = []

    def judge() -> None:
        """Claims all the while: each answer is a prediction or a clean refusal, never a 500."""
        with httpx.Client(base_url=deployment.client.base_url, timeout=60, trust_env=False) as client:
            while not over.is_set():
                try:
                    ask = {"claim": "The Rhine is long.", "max_steps": 2, "adapter": None}
                    statuses.append(client.post("/predict", json=ask).status_code)
                except httpx.TransportError:
                    pass
                time.sleep(0.3)

    judges = [threading.Thread(target=judge) for _ in range(2)]
    for thread in judges:
        thread.start()
    try:
        patiently(lambda: _past_checkpoint(deployment, job))
        for name in VICTIMS:
            kill(deployment, name)
            time.sleep(4)
        done = patiently(lambda: _ended(deployment, job), seconds=900)
    finally:
        over.set()
        for thread in judges:
            thread.join()
    assert done["status"] == "succeeded", done["error"]
    assert set(statuses) <= {200, 503, 429}
    assert 200 in statuses
    answer = patiently(lambda: deployment.post("/predict", json={"claim": "The Rhine is long.", "max_steps": 2}))
    assert answer["adapter"] == done["adapter_id"]
    events = deployment.get(f"/jobs/{job}/events?limit=1000")["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events].count("succeeded") == 1


def _past_checkpoint(deployment: Deployment, job: str) -> None:
    assert deployment.get(f"/jobs/{job}/checkpoints")["data"]


def _ended(deployment: Deployment, job: str) -> Any:
    found = deployment.get(f"/jobs/{job}")
    assert found["status"] in ("succeeded", "failed", "cancelled"), found["progress"]
    return found


def test_a_job_posted_while_the_broker_is_down_starts(deployment: Deployment) -> None:
    rows = (ROOT / "examples/train.jsonl").read_bytes()
    deployment.post("/datasets", files={"file": ("t.jsonl", rows)}, data={"name": "demo"})
    kill(deployment, "broker")
    job = deployment.post("/jobs", json=SPEC | {"trainer": {"train_steps": 1, "effective_batch_size": 1}})
    assert deployment.wait_for_job(job["id"])["status"] == "succeeded"
