"""A job that is too large for its device, under a real memory limit: refused, and trained once a remedy is applied."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cgroup import memory_group
from tests.conftest import ROOT
from tests.e2e.conftest import Deployment, start, stop

pytestmark = pytest.mark.acceptance

LIMIT = 3_000 << 20
"""Full fine-tuning of the small model holds 2,560 MiB of masters, moments and gradients beside the process itself."""

SPEC: dict[str, Any] = {
    "dataset": "examples",
    "adapter": None,
    "quantization": None,
    "trainer": {"train_steps": 4, "effective_batch_size": 8},
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`veritune up`, whose trainer may take `LIMIT` bytes."""
    with memory_group(LIMIT) as group:
        running = start(tmp_path_factory.mktemp("up") / "home")
        try:
            rows = (ROOT / "examples" / "train.jsonl").read_bytes()
            running.post("/datasets", files={"file": ("t.jsonl", rows)}, data={"name": "examples"})
            group.take(next(p for p in running.processes() if p.environ().get("VERITUNE_WORKER_QUEUES") == "gpu"))
            yield running
        finally:
            assert stop(running) == []


@pytest.fixture(scope="module")
def too_soon(deployment: Deployment) -> Any:
    """The job, posted before the trainer has told its limit: nothing is known that speaks against it."""
    return deployment.wait_for_job(deployment.post("/jobs", json=SPEC)["id"])


@pytest.fixture(scope="module")
def planned(deployment: Deployment, too_soon: Any) -> Any:
    """The plan, once the limit is known."""
    until = time.monotonic() + 60
    while (found := deployment.post("/jobs/plan", json=SPEC))["device_bytes"] > LIMIT:
        assert time.monotonic() < until
        time.sleep(1)
    return found


def merged(spec: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The config with the change written in, as a user would."""
    inner = {key: merged(spec[key] or {}, value) for key, value in change.items() if isinstance(value, dict)}
    return spec | change | inner


def test_a_job_that_was_not_refused_is_killed(too_soon: Any) -> None:
    assert too_soon["plan"]["fits"]
    assert too_soon["status"] == "failed"
    assert too_soon["error"]["code"] == "worker_lost"
    assert "memory" in too_soon["error"]["hint"]


def test_it_is_refused_with_what_would_make_it_fit(deployment: Deployment, planned: Any) -> None:
    assert not planned["fits"]
    assert planned["memory"]["total"] > planned["device_bytes"]
    answer = deployment.client.post("/jobs", json=SPEC)
    assert (answer.status_code, answer.json()["code"]) == (422, "does_not_fit"), answer.text
    assert len(answer.json()["errors"]) == len(planned["remedies"]) > 0


def test_each_remedy_really_trains_under_the_limit(deployment: Deployment, planned: Any) -> None:
    for remedy in planned["remedies"]:
        job = deployment.post("/jobs", json=merged(SPEC, remedy["change"]))
        assert job["plan"]["memory"]["total"] == remedy["bytes"] <= planned["device_bytes"]
        done = deployment.wait_for_job(job["id"])
        assert done["status"] == "succeeded", (remedy, done["error"])
        assert done["attempts"] == 1, "the limit killed it once"
        adapter = deployment.get(f"/adapters/{done['adapter_id']}")
        assert adapter["manifest"]["metrics"]["peak_memory_bytes"] <= remedy["bytes"]
