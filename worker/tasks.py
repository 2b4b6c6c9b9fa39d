"""The only Celery task: the doorbell rang, so look for work."""

from celery import Celery

from app.queue.celery import TASK
from worker.slot import Slot


def register(application: Celery, slot: Slot) -> None:
    """Register the task that a ring calls. It ignores the job id: the lease decides which job runs."""

    @application.task(name=TASK)  # type: ignore[untyped-decorator]
    def work(_job_id: str) -> None:
        slot.drain()
