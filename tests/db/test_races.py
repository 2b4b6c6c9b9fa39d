"""What users ask for at the very moment at which a worker changes the same job, on both databases."""

import threading
import time
from pathlib import Path

import pytest

from app.composition import Services
from app.domain.errors import ConflictError
from app.domain.jobs import Job, JobAction, JobStatus
from tests.db.rows import job_row

KINDS = ["train"]


@pytest.fixture
def job(services: Services, upload: Path) -> Job:
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0]
    return services.jobs.submit({"dataset": dataset.id})


def test_a_cancel_that_meets_a_lease_is_not_lost(services: Services, job: Job) -> None:
    inside = threading.Event()

    def lease() -> None:
        with services.database.write() as unit:
            assert unit.jobs.lease(KINDS, "worker-1", 30.0) is not None
            inside.set()
            time.sleep(0.3)

    worker = threading.Thread(target=lease)
    worker.start()
    inside.wait(10)
    requested = services.jobs.request_action(job.id, JobAction.CANCEL)
    worker.join()

    assert requested.status is JobStatus.CANCELLING
    assert services.jobs.get(job.id).status is JobStatus.CANCELLING


def test_a_dataset_whose_job_is_just_coming_in_stays(services: Services, job: Job) -> None:
    services.jobs.request_action(job.id, JobAction.CANCEL)
    inside = threading.Event()
    coming = job_row()
    coming.dataset_id = job.spec.dataset

    def submit() -> None:
        with services.database.write() as unit:
            unit.jobs.add(coming)
            inside.set()
            time.sleep(0.3)

    arriving = threading.Thread(target=submit)
    arriving.start()
    inside.wait(10)
    with pytest.raises(ConflictError, match=coming.id):
        services.datasets.delete("rows")
    arriving.join()
