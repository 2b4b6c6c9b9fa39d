"""Following a job's events: one poller a process, fanned out to however many clients listen."""

import asyncio
from collections.abc import AsyncIterator

from app.db import Database
from app.domain.errors import NotFoundError, UnavailableError
from app.domain.jobs import TERMINAL, Event
from app.services.jobs import Jobs

PERIOD = 0.25
PAGE = 500
QUIET = 15.0
"""Seconds after which a listener is told that nothing happened: proxies close what is silent for long."""


class EventFeed:
    """Lives on the API's event loop. The database is asked once a period for all followed jobs together."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs
        self._followed: dict[str, list[asyncio.Event]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def follow(self, reference: str, after: int) -> AsyncIterator[Event | None]:
        """Events behind number `after` as they come. Ends with the last event of a finished job, or when it is deleted.

        None stands for a while in which nothing happened: listeners may tell their clients that they are still there.
        """
        job = await asyncio.to_thread(self._jobs.get, reference)
        news = asyncio.Event()
        news.set()
        self._followed.setdefault(job.id, []).append(news)
        self._wake()
        try:
            while True:
                if not await _within(news, QUIET):
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
        seen: dict[str, int | None] = {}
        while self._followed:
            try:
                latest = await asyncio.to_thread(self._latest, list(self._followed))
            except UnavailableError:  # the database is away for a moment; listeners stay
                latest = {}
            for job_id, seq in latest.items():
                if seen.get(job_id) != seq:
                    seen[job_id] = seq
                    for news in self._followed.get(job_id, ()):
                        news.set()
            await asyncio.sleep(PERIOD)

    def _latest(self, job_ids: list[str]) -> dict[str, int | None]:
        """Job id → the number of its newest event; None for a job that was deleted."""
        with self._database.read() as unit:
            return dict.fromkeys(job_ids) | unit.jobs.latest_events(job_ids)


async def _within(news: asyncio.Event, seconds: float) -> bool:
    """Whether there was news within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True
