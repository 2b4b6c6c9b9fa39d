"""One device, two tenants, under a real memory limit: inference is suspended while a job trains, and resumes."""

import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest

from tests.cgroup import memory_group
from tests.conftest import ROOT
from tests.e2e.conftest import Deployment, start, stop
from tests.waiting import until

pytestmark = pytest.mark.acceptance

LIMIT = 3_000 << 20
"""The small model's engine takes 1.1 GB and the job is planned at 2 GB: one of them has to go."""

RESTING = 256 << 20
"""What inference may still take within ten seconds of a job's start: the front, without an engine."""

CLAIM = {"claim": "The Danube flows into the Black Sea.", "adapter": None, "max_steps": 1}
SPEC: dict[str, Any] = {
    "dataset": "examples",
    "trainer": {"train_steps": 30, "batch_size": 8, "effective_batch_size": 8, "enable_gradient_checkpointing": False},
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`veritune up`, whose trainer and inference have `LIMIT` bytes together."""
    with memory_group(LIMIT) as group:
        running = start(tmp_path_factory.mktemp("up") / "home")
        try:
            for route, name in (("/datasets", "train.jsonl"), ("/corpora", "corpus.jsonl")):
                content = (ROOT / "examples" / name).read_bytes()
                running.post(route, files={"file": (name, content)}, data={"name": "examples"})
            running.post("/corpora/examples/promote")
            group.take(psutil.Process(running.process.pid))
            for process in (trainer(running), front(running)):
                process.kill()  # what it has was not counted in the group; `up` starts another there
            ready_again(running)
            yield running
        finally:
            assert stop(running) == []


def trainer(deployment: Deployment) -> psutil.Process:
    return next(
        p
        for p in psutil.Process(deployment.process.pid).children()
        if p.status() != psutil.STATUS_ZOMBIE and p.environ().get("VERITUNE_WORKER_QUEUES") == "gpu"
    )


def front(deployment: Deployment) -> psutil.Process:
    return deployment.find("-m", "worker.inference")


def device(deployment: Deployment) -> Any:
    return next(d for d in deployment.get("/devices")["data"] if "gpu" in d["queues"])


def reserved(deployment: Deployment) -> set[str]:
    return {one["tenant"] for one in device(deployment)["reservations"]}


def ready_again(deployment: Deployment) -> None:
    until(lambda: device(deployment)["bytes"] < LIMIT and answers(deployment), 90)


def answers(deployment: Deployment) -> bool:
    answer = deployment.client.post("/predict", json=CLAIM)
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


def resident(deployment: Deployment) -> int:
    """Bytes of inference: front and engine."""
    found = front(deployment)
    family = [found, *found.children(recursive=True)]
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def seconds_since(at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()


def updates(deployment: Deployment, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = deployment.get(f"/jobs/{job_id}/metrics?limit=100")["data"]
    return found


def wait_at_known_pace(yielding: dict[str, Any], at: float, update: int) -> float:
    """Seconds from `at` to the first answer, had the machine kept the pace that it had had: in the updates until
    `update`, and when inference came back the last time. No estimate can know that a machine will slow down."""
    during = yielding["updates"]["during"]
    known, left = yielding["updates"]["before"] + during[:update], during[update:]
    seconds_per_token = sum(row["seconds"] for row in known) / sum(row["tokens"] for row in known)
    surprise = sum(row["seconds"] - row["tokens"] * seconds_per_token for row in left)
    surprise += yielding["backs"]["during"] - yielding["backs"]["before"]
    return float(yielding["answered"] - at - surprise)


def say(measured: dict[str, Any]) -> None:
    """Shown with `pytest -rP`: the figures of docs/decisions/0011."""
    sys.stdout.write(f"{measured}\n")


def status(deployment: Deployment, job_id: str) -> str:
    return str(deployment.get(f"/jobs/{job_id}")["status"])


@pytest.fixture(scope="module")
def paced(deployment: Deployment) -> Any:
    """A first, short job, from which plans learn what this device makes of the base. `back`: seconds from its end to
    the first answer."""
    short = SPEC | {"trainer": SPEC["trainer"] | {"train_steps": 8}}
    job = deployment.wait_for_job(deployment.post("/jobs", json=short)["id"])
    until(lambda: answers(deployment), 60)
    return job | {"back": seconds_since(job["finished_at"])}


@pytest.fixture(scope="module")
def yielding(deployment: Deployment, paced: Any) -> dict[str, Any]:
    """One job from its submission to the first answer behind it, with all that was seen on the way."""
    seen: dict[str, Any] = {"before": resident(deployment), "told": []}
    began = time.monotonic()
    job = deployment.post("/jobs", json=SPEC)
    seen["job"] = job
    until(lambda: resident(deployment) < RESTING, 30)
    seen["made_way"] = time.monotonic() - began
    seen["resting"] = resident(deployment)
    while status(deployment, job["id"]) in ("running", "queued"):
        answer = deployment.client.post("/predict", json=CLAIM)
        if answer.status_code == 200:
            break
        progress = deployment.get(f"/jobs/{job['id']}")["progress"]
        seen["told"].append((time.monotonic(), int(answer.headers["Retry-After"]), progress["update"], answer.json()))
        seen["most"] = max(seen.get("most", 0), resident(deployment))
        time.sleep(2)
    done = deployment.wait_for_job(job["id"])
    until(lambda: answers(deployment), 60)
    seen |= {"done": done, "back": seconds_since(done["finished_at"]), "answered": time.monotonic()}
    seen["backs"] = {"before": paced["back"], "during": seen["back"]}
    seen["updates"] = {"before": updates(deployment, paced["id"]), "during": updates(deployment, job["id"])}
    waits = [(after, round(seen["answered"] - at, 1), update) for at, after, update, _ in seen["told"]]
    say({k: seen[k] for k in ("before", "made_way", "resting", "most", "backs")} | {"told, waited, update": waits})
    say(
        {
            "told, at known pace": [
                (told[1], round(wait_at_known_pace(seen, told[0], told[2]), 1)) for told in seen["told"]
            ]
        }
    )
    return seen


def test_the_plan_says_that_inference_will_be_suspended(deployment: Deployment, yielding: dict[str, Any]) -> None:
    plan = yielding["job"]["plan"]
    assert (plan["policy"], plan["fits"]) == ("yield", True)
    events = deployment.get(f"/jobs/{yielding['job']['id']}/events")["data"]
    assert any("waiting for inference" in event["message"] for event in events)


def test_inference_frees_its_memory_within_ten_seconds(yielding: dict[str, Any]) -> None:
    assert yielding["before"] > 2 * RESTING
    assert yielding["made_way"] < 10
    assert yielding["most"] < RESTING
    assert yielding["done"]["status"] == "succeeded", yielding["done"]["error"]
    assert yielding["done"]["attempts"] == 1, "the limit killed it once"


def test_requests_meanwhile_get_retry_after(yielding: dict[str, Any]) -> None:
    assert len(yielding["told"]) > 10
    for at, after, update, problem in yielding["told"]:
        assert problem["code"] == "inference_away"
        assert "inference is suspended while a job trains" in problem["detail"]
        wait = wait_at_known_pace(yielding, at, update)
        assert abs(after - wait) <= max(0.2 * wait, 1.0), (after, wait, update)


def test_the_first_answer_comes_soon_after_the_job(yielding: dict[str, Any]) -> None:
    assert yielding["back"] < 30


def test_a_killed_trainer_keeps_nothing_beyond_its_lease(deployment: Deployment, yielding: dict[str, Any]) -> None:
    lease = 10.0
    job = deployment.post("/jobs", json=SPEC)
    until(lambda: deployment.get(f"/jobs/{job['id']}")["progress"]["update"] > 0, 90)
    assert reserved(deployment) == {"training"}
    os.kill(trainer(deployment).pid, 9)
    deployment.post(f"/jobs/{job['id']}/cancel")
    gone = until(lambda: "training" not in reserved(deployment), lease + 1)
    back = until(lambda: answers(deployment), 40)
    say({"gone": gone, "back": back})
    assert reserved(deployment) == {"inference"}
    until(lambda: status(deployment, job["id"]) == "cancelled", 30)
