"""Reads jobs for many polling clients: requests that arrive during one read share the next one.

A thread per request would cost several times as much as the read, because the threads contend for the interpreter
lock. No result is cached between reads, so an answer is never older than its request.
"""

import asyncio
from itertools import islice

from app.domain.jobs import Job
from app.services.jobs import Jobs, unknown_job

MAX_REFERENCES = 500
"""References in one read. Databases limit the parameters of a statement."""

_PendingAnswer = asyncio.Future[Job | Exception]


class JobSnapshots:
    """Lives on the API's event loop."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._waiting: dict[str, list[_PendingAnswer]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, reference: str) -> Job:
        """The same job, or the same error, as `Jobs.get`."""
        answer: _PendingAnswer = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(reference, []).append(answer)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._answer_all())
        found = await answer
        if isinstance(found, Exception):
            raise found
        return found

    async def _answer_all(self) -> None:
        """Answer the waiting requests, batch by batch, until none is left."""
        while references := list(islice(self._waiting, MAX_REFERENCES)):
            batch = {reference: self._waiting.pop(reference) for reference in references}
            found = await asyncio.to_thread(self._read_jobs, references)
            for reference, answers in batch.items():
                for answer in answers:
                    if not answer.done():  # a cancelled request has a future that is done
                        answer.set_result(found[reference])

    def _read_jobs(self, references: list[str]) -> dict[str, Job | Exception]:
        """Reference → its job, or the error that its request gets."""
        try:
            jobs = self._jobs.get_jobs(references)
        except Exception as error:
            return dict.fromkeys(references, error)
        return {reference: jobs.get(reference) or unknown_job(reference) for reference in references}
