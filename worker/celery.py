"""The worker's composition root: `celery -A worker.celery worker -Q gpu` or, the same, `veritune worker gpu`.

Celery carries the doorbell only. The slot's threads find work and report the device, so the worker runs without a
broker, too.
"""

import os
import threading
import uuid
from typing import Any

from celery.signals import worker_init, worker_shutting_down

from app.composition import compose
from app.logs import configure_logs
from app.queue.celery import celery_app
from app.settings import read_settings
from worker.slot import Slot
from worker.supervisor import Supervisor
from worker.tasks import register

settings = read_settings()
configure_logs(settings.log_format)
services = compose(settings)
owner = f"{settings.host_name}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
slot = Slot(
    services,
    Supervisor(services, owner, settings.queues),
    name=settings.worker_name,
    queues=settings.queues,
)
application = celery_app(settings.broker)
register(application, slot)


@worker_init.connect  # type: ignore[untyped-decorator]
def _begin(**_signal: Any) -> None:
    slot.start()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _leave(**_signal: Any) -> None:
    # In a thread: Celery calls this in its signal handler, which must not wait for the child.
    threading.Thread(target=slot.leave, name="leave").start()
