"""`kill -9` of a training child at all kinds of moments: it publishes what an undisturbed one does."""

import contextlib
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.cli.models import fetch
from app.composition import Services
from app.domain.jobs import Job, JobStatus
from app.settings import Settings
from tests.conftest import MODEL_CACHE, dataset_jsonl
from worker.supervisor import Supervisor

pytestmark = pytest.mark.chaos

BASES = {"tiny": (120, 8), "smollm2-135m": (20, 3)}
"""Base model → (updates of a job, updates between its checkpoints)."""

KILLS = 10
IN_A_CHECKPOINT = 4
"""So many of the kills hit a child that is writing a checkpoint."""


def spec_of(base: str) -> dict[str, Any]:
    updates, every = BASES[base]
    return {
        "base_model": base,
        "adapter": {"type": "lora", "r": 4, "dropout": 0.05},
        "quantization": {"bits": 4},
        "trainer": {
            "train_steps": updates,
            "effective_batch_size": 6,
            "batch_size": 1,  # six micro-batches an update: most moments lie inside an accumulation
            "steps_per_checkpoint": every,
            "learning_rate": 1e-3,
        },
    }


@pytest.fixture
def settings(settings: Settings, base: str) -> Settings:
    """The tiny model in a cache of its own; the real one where `make model` has put it."""
    return settings if base == "tiny" else settings.model_copy(update={"cache": MODEL_CACHE})


@pytest.fixture
def dataset(services: Services, tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl(40))
    return services.datasets.create(path, "rows.jsonl", None, None, {})[0].id


def child() -> psutil.Process | None:
    """The training child, while there is one."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one too
            if "worker.training" in process.cmdline():
                return process
    return None


def last_update(services: Services, job: Job) -> int:
    return max((row.update for row in services.jobs.metrics(job.id, 0, 1_000)[0]), default=0)


def digest(services: Services, job: Job) -> str:
    done = services.jobs.get(job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    return services.adapters.get(str(done.adapter_id)).digest


def kill_while_writing(services: Services, job: Job) -> None:
    """Stop the child over and over until it stands still in the middle of a checkpoint, and kill it there."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        process = child()
        if process is not None and list(services.settings.work_path.glob(f"{job.id}/*/checkpoints/*.partial")):
            process.send_signal(signal.SIGSTOP)
            if list(services.settings.work_path.glob(f"{job.id}/*/checkpoints/*.partial")):
                process.kill()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("no checkpoint was seen being written")


def kill_at_random(services: Services, job: Job, chance: random.Random, updates: int) -> None:
    after = chance.randrange(1, 2 * updates // 3)
    end = time.monotonic() + 600
    while last_update(services, job) < after:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(chance.random() * 0.2)
    process = child()
    assert process is not None, "it was over before it could be killed"
    process.kill()


@pytest.mark.parametrize("base", BASES)
def test_ten_killed_jobs_publish_what_an_undisturbed_one_does(services: Services, dataset: str, base: str) -> None:
    if base not in {known.name for known in services.base_models.list_base_models()}:
        fetch(services, base)
    supervisor, chance = Supervisor(services, "worker-1", ("gpu",)), random.Random(11)
    spec, (updates, every) = spec_of(base), BASES[base]
    reference = services.jobs.submit({"dataset": dataset, "name": "undisturbed", **spec})
    assert supervisor.work()
    wanted = digest(services, reference)

    for number in range(KILLS):
        job = services.jobs.submit({"dataset": dataset, "name": f"killed-{number}", **spec})
        attempt = threading.Thread(target=supervisor.work, daemon=True)
        attempt.start()
        if number < IN_A_CHECKPOINT:
            kill_while_writing(services, job)
        else:
            kill_at_random(services, job, chance, updates)
        attempt.join(300)
        assert not attempt.is_alive()
        assert services.jobs.get(job.id).status is JobStatus.QUEUED
        reached = last_update(services, job)

        assert supervisor.work()

        began = [e.data for e in services.jobs.events(job.id, 0, 1_000)[0] if e.kind == "training"]
        assert reached - began[-1]["resumed_from_update"] <= every
        assert digest(services, job) == wanted
