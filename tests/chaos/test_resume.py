"""`kill -9` of a training child at all kinds of moments: it publishes what an undisturbed one does."""

import contextlib
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from app.composition import Services
from app.domain.jobs import Job, JobStatus
from tests.conftest import dataset_jsonl
from worker.supervisor import Supervisor

pytestmark = pytest.mark.chaos

EVERY = 8
SPEC = {
    "adapter": {"type": "lora", "r": 4, "dropout": 0.05},
    "quantization": {"bits": 4},
    "trainer": {
        "train_steps": 120,
        "effective_batch_size": 6,
        "batch_size": 1,  # six micro-batches an update: most moments lie inside an accumulation
        "steps_per_checkpoint": EVERY,
        "learning_rate": 1e-3,
    },
}
KILLS = 10
IN_A_CHECKPOINT = 4
"""So many of the kills hit a child that is writing a checkpoint."""


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
    end = time.monotonic() + 120
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


def kill_at_random(services: Services, job: Job, chance: random.Random) -> None:
    after = chance.randrange(1, 80)
    end = time.monotonic() + 120
    while last_update(services, job) < after:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(chance.random() * 0.2)
    process = child()
    assert process is not None, "it was over before it could be killed"
    process.kill()


def test_ten_killed_jobs_publish_what_an_undisturbed_one_does(services: Services, dataset: str) -> None:
    supervisor, chance = Supervisor(services, "worker-1", ("gpu",)), random.Random(11)
    reference = services.jobs.submit({"dataset": dataset, "name": "undisturbed", **SPEC})
    assert supervisor.work()
    wanted = digest(services, reference)

    for number in range(KILLS):
        job = services.jobs.submit({"dataset": dataset, "name": f"killed-{number}", **SPEC})
        attempt = threading.Thread(target=supervisor.work)
        attempt.start()
        if number < IN_A_CHECKPOINT:
            kill_while_writing(services, job)
        else:
            kill_at_random(services, job, chance)
        attempt.join(60)
        assert not attempt.is_alive()
        assert services.jobs.get(job.id).status is JobStatus.QUEUED
        reached = last_update(services, job)

        assert supervisor.work()

        began = [e.data for e in services.jobs.events(job.id, 0, 1_000)[0] if e.kind == "training"]
        assert reached - began[-1]["resumed_from_update"] <= EVERY
        assert digest(services, job) == wanted
