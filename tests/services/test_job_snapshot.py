"""Many polling clients: one read answers all requests before it, and none that arrived during it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from app.composition import Services
from app.db import Database
from app.domain.errors import NotFoundError, UnavailableError
from app.domain.jobs import Job, JobAction, JobStatus
from app.services.job_snapshot import JobSnapshots
from app.services.jobs import Jobs


@pytest.fixture
def jobs(services: Services, upload: Path) -> list[Job]:
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id
    return [services.jobs.submit({"dataset": dataset, "name": name}) for name in ("first", "second")]


@contextmanager
def reads_of(services: Services, each: Any = None) -> Iterator[list[str]]:
    """The statements that read jobs while the block runs. `each` is called after every one."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "queue_position" in statement:
            statements.append(statement)
            if each:
                each()

    event.listen(services.database.engine, "after_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(services.database.engine, "after_cursor_execute", note)


def test_concurrent_requests_are_answered_by_one_read(services: Services, jobs: list[Job]) -> None:
    async def ask() -> list[Job]:
        names = ["first", "second", jobs[0].id] * 20
        return await asyncio.gather(*(services.job_snapshots.get(name) for name in names))

    with reads_of(services) as statements:
        answers = asyncio.run(ask())
    assert answers == [jobs[0], jobs[1], jobs[0]] * 20
    assert len(statements) == 1


def test_an_answer_is_never_older_than_its_question(services: Services, jobs: list[Job]) -> None:
    """The second request follows a pause that the running read did not see."""
    has_read, may_answer = threading.Event(), threading.Event()

    def hold() -> None:
        if not has_read.is_set():
            has_read.set()
            assert may_answer.wait(20)

    async def ask() -> tuple[Job, Job]:
        before = asyncio.create_task(services.job_snapshots.get("first"))
        assert await asyncio.to_thread(has_read.wait, 20)
        await asyncio.to_thread(services.jobs.request_action, "first", JobAction.PAUSE)
        after = asyncio.create_task(services.job_snapshots.get("first"))
        await asyncio.sleep(0)
        may_answer.set()
        return await before, await after

    with reads_of(services, hold):
        before, after = asyncio.run(ask())
    assert (before.status, after.status) == (JobStatus.QUEUED, JobStatus.PAUSED)


def test_only_the_request_for_an_unknown_job_gets_the_error(services: Services, jobs: list[Job]) -> None:
    async def ask() -> list[Job | BaseException]:
        asked = (services.job_snapshots.get(name) for name in ("first", "nowhere"))
        return await asyncio.gather(*asked, return_exceptions=True)

    known, unknown = asyncio.run(ask())
    assert known == jobs[0]
    assert isinstance(unknown, NotFoundError)
    assert "'nowhere'" in unknown.detail


def test_a_cancelled_request_does_not_delay_the_others(services: Services, jobs: list[Job]) -> None:
    async def ask() -> Job:
        cancelled, waiting = (asyncio.create_task(services.job_snapshots.get("first")) for _ in range(2))
        await asyncio.sleep(0)
        cancelled.cancel()
        return await asyncio.wait_for(waiting, 20)

    assert asyncio.run(ask()) == jobs[0]


def test_every_request_gets_the_error_of_an_unavailable_database(services: Services, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    away = Database(f"sqlite:///{tmp_path / 'folder'}")
    polls = JobSnapshots(Jobs(away, services.blobs, services.plans, services.evaluations, services.doorbell))

    async def ask() -> list[Job | BaseException]:
        answers: list[Job | BaseException] = []
        for _ in range(2):
            answers += await asyncio.gather(polls.get("a"), polls.get("b"), return_exceptions=True)
        return answers

    answers = asyncio.run(ask())
    away.close()
    assert [type(answer) for answer in answers] == [UnavailableError] * 4
