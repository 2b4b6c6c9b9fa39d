"""Jobs as many clients poll them: whoever asks while a read is under way is answered by the next, with all others.

A thread for each question costs several times what the reading does, because threads wait for one another at every
step of it. Nothing is kept from one read for the next, so an answer is never older than its question.
"""

import asyncio
from itertools import islice

from app.domain.jobs import Job
from app.services.jobs import Jobs, unknown_job

MOST = 500
"""References of one read: databases bound the parameters of a statement."""

_Answer = asyncio.Future[Job | Exception]


class JobSnapshots:
    """Lives on the API's event loop."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._asked: dict[str, list[_Answer]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, reference: str) -> Job:
        """The job as `Jobs.get` gives it."""
        answer: _Answer = asyncio.get_running_loop().create_future()
        self._asked.setdefault(reference, []).append(answer)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        found = await answer
        if isinstance(found, Exception):
            raise found
        return found

    async def _read(self) -> None:
        """Read for those who have asked, until nobody has."""
        while asked := {reference: self._asked.pop(reference) for reference in list(islice(self._asked, MOST))}:
            found = await asyncio.to_thread(self._found, list(asked))
            for reference, answers in asked.items():
                for answer in answers:
                    if not answer.done():  # who asked may be gone
                        answer.set_result(found[reference])

    def _found(self, references: list[str]) -> dict[str, Job | Exception]:
        """Each reference's job, or why it has none."""
        try:
            jobs = self._jobs.get_jobs(references)
        except Exception as error:
            return dict.fromkeys(references, error)
        return {reference: jobs.get(reference) or unknown_job(reference) for reference in references}
