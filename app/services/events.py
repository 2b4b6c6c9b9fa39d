"""Streams of job events: one poller per process serves all listening clients."""

import asyncio
from collections.abc import AsyncIterator

from app.db import Database
from app.domain.errors import NotFoundError, UnavailableError
from app.domain.jobs import TERMINAL, Event
from app.services.jobs import Jobs

PERIOD = 0.25
PAGE = 500
KEEP_ALIVE = 15.0
"""Seconds without an event after which a listener gets a None: proxies close idle connections."""


class EventFeed:
    """Runs on the API's event loop. One query per PERIOD reads the newest event numbers of all followed jobs."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs
        self._followed: dict[str, list[asyncio.Event]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def follow(self, reference: str, after: int) -> AsyncIterator[Event | None]:
        """Yield the events after number `after` as they come, until the job has ended or is deleted.

        Yields None after KEEP_ALIVE seconds without an event, so that listeners can keep their connections open.
        """
        job = await asyncio.to_thread(self._jobs.get, reference)
        news = asyncio.Event()
        news.set()
        self._followed.setdefault(job.id, []).append(news)
        self._wake()
        try:
            while True:
                if not await _wait_for(news, KEEP_ALIVE):
                    yield None
                    self._wake()
                news.clear()
                over = (await asyncio.to_thread(self._jobs.get, job.id)).status in TERMINAL
                more = True
                while more:
                    events, more = await asyncio.to_thread(self._jobs.events, job.id, after, PAGE)
                    for event in events:
                        after = event.seq
                        yield event
                if over:
                    return
        except NotFoundError:  # the job was deleted
            return
        finally:
            self._followed[job.id].remove(news)
            if not self._followed[job.id]:
                del self._followed[job.id]

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()

    def _wake(self) -> None:
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        latest_by_job: dict[str, int | None] = {}
        while self._followed:
            try:
                latest = await asyncio.to_thread(self._latest, list(self._followed))
            except UnavailableError:  # the database is unavailable for a moment; listeners remain
                latest = {}
            for job_id, seq in latest.items():
                if latest_by_job.get(job_id) != seq:
                    latest_by_job[job_id] = seq
                    for news in self._followed.get(job_id, ()):
                        news.set()
            await asyncio.sleep(PERIOD)

    def _latest(self, job_ids: list[str]) -> dict[str, int | None]:
        """Job id → the number of its newest event. None for a deleted job."""
        with self._database.read() as unit:
            return dict.fromkeys(job_ids) | unit.jobs.latest_events(job_ids)


async def _wait_for(news: asyncio.Event, seconds: float) -> bool:
    """Whether `news` was set within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True
