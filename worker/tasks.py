"""The one task: the doorbell rang, so look for work."""

from celery import Celery

from app.queue.celery import TASK
from worker.slot import Slot


def register(application: Celery, slot: Slot) -> None:
    """Give `application` the task that a ring calls. Its argument only says why it rang; the lease decides."""

    @application.task(name=TASK)  # type: ignore[untyped-decorator]
    def work(_job_id: str) -> None:
        slot.drain()
