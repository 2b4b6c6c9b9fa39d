"""A job that has ended is deleted with all that belongs to it, and its name is free again. Its adapter stays."""

import asyncio
from pathlib import Path

import pytest

from app.composition import Services
from app.db.base import Base
from app.domain.errors import ConflictError, LeaseLostError, NotFoundError
from app.domain.jobs import TERMINAL, Job, JobAction, JobError, JobStatus, Lease
from tests.api.conftest import lease, make_adapter, make_checkpoint, metric, traces

BROKEN = JobError(code="out_of_memory", message="no room", hint=None)


@pytest.fixture
def dataset(services: Services, upload: Path) -> str:
    return services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id


@pytest.fixture
def job(services: Services, dataset: str) -> Job:
    return services.jobs.submit({"dataset": dataset, "name": "first"})


def work(services: Services, directory: Path) -> Lease:
    """Take the job and leave one of everything that belongs to a job: metrics, a checkpoint, an artifact."""
    held = lease(services)
    services.attempts.record(held, [metric(1)], 1.0)
    make_checkpoint(services, held, directory / "1", 1)
    (directory / "rows.jsonl").write_text("{}")
    services.artifacts.put(held, directory / "rows.jsonl")
    return held


def test_nothing_is_left_of_a_deleted_job(services: Services, dataset: str, tmp_path: Path) -> None:
    services.jobs.plan({"dataset": dataset})  # encodes the rows, which are kept with the dataset
    before = traces(services)
    job = services.jobs.submit({"dataset": dataset, "name": "first"})
    services.attempts.fail(work(services, tmp_path), BROKEN)
    assert len([table for table in Base.metadata.tables if traces(services)[table] > before[table]]) == 5
    services.jobs.delete("first")
    assert traces(services) == before
    for reference in ("first", job.id):
        with pytest.raises(NotFoundError):
            services.jobs.get(reference)
        with pytest.raises(NotFoundError):
            services.jobs.delete(reference)


def test_its_name_is_free_again(services: Services, dataset: str, job: Job) -> None:
    services.jobs.request_action(job.id, JobAction.CANCEL)
    services.jobs.delete(job.id)
    assert services.jobs.submit({"dataset": dataset, "name": "first"}).id != job.id


def test_its_adapter_stays_and_serves(services: Services, job: Job, tmp_path: Path) -> None:
    """The adapter shares files with the checkpoint, which is deleted."""
    held = work(services, tmp_path)
    early = services.checkpoints.publish(job.id, 1, "early")
    adapter = make_adapter(services, held, tmp_path / "adapter", "first")
    before = {found.id: found for found in services.adapters.list_adapters(None, 10)[0]}
    services.jobs.delete(job.id)
    assert {found.id: found for found in services.adapters.list_adapters(None, 10)[0]} == before
    for reference in (early.id, adapter):
        _name, archive = services.adapters.archive(reference)
        assert b"".join(archive)
    services.adapters.delete(adapter)
    services.adapters.delete(early.id)
    assert (traces(services)["adapters"], traces(services)["checkpoints"]) == (0, 0)


def test_a_job_that_has_not_ended_stays(services: Services, job: Job) -> None:
    def refused() -> JobStatus:
        status = services.jobs.get(job.id).status
        assert status not in TERMINAL
        with pytest.raises(ConflictError, match=f"is {status}; only a job that has ended"):
            services.jobs.delete(job.id)
        return status

    seen = [refused()]
    services.jobs.request_action(job.id, JobAction.PAUSE)
    seen.append(refused())
    services.jobs.request_action(job.id, JobAction.RESUME)
    lease(services)
    seen.append(refused())
    services.jobs.request_action(job.id, JobAction.PAUSE)
    seen.append(refused())
    services.jobs.request_action(job.id, JobAction.CANCEL)
    seen.append(refused())
    assert set(seen) == set(JobStatus) - set(TERMINAL)


def test_an_attempt_of_a_deleted_job_changes_nothing(services: Services, job: Job, tmp_path: Path) -> None:
    held = lease(services)
    services.attempts.fail(held, BROKEN)
    services.jobs.delete(job.id)
    with pytest.raises(LeaseLostError):
        services.attempts.record(held, [metric(2)], 1.0)
    with pytest.raises(LeaseLostError):
        services.attempts.add_event(held, "note", "still here")


def test_an_event_stream_ends_when_its_job_is_deleted(services: Services, job: Job) -> None:
    async def follow() -> list[str]:
        kinds = []
        async for event in services.events.follow(job.id, 0):
            assert event is not None
            kinds.append(event.kind)
            services.jobs.request_action(job.id, JobAction.CANCEL)
            services.jobs.delete(job.id)
        await services.events.close()
        return kinds

    assert asyncio.run(asyncio.wait_for(follow(), 10)) == ["queued"]
