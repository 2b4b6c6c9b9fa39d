"""The doorbell over Celery on Redis: one small message per job. A lost or repeated message does no harm."""

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.domain.specs import JobKind
from app.queue.base import QUEUES

TASK = "veritune.work"
log = structlog.get_logger(__name__)


def celery_app(broker: str) -> Celery:
    """The Celery application that both ends share. Results are not used: the database holds them."""
    application = Celery("veritune", broker=broker)
    application.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,  # a redelivered message would start a second run
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=2,
        broker_transport_options={
            "socket_connect_timeout": 2,
            "socket_timeout": 5,
            "max_retries": 0,
        },
        task_routes={},
        task_default_queue="gpu",
        worker_hijack_root_logger=False,
    )
    return application


class CeleryDoorbell:
    def __init__(self, application: Celery) -> None:
        self._application = application

    def ring(self, job_id: str, kind: JobKind) -> bool:
        try:
            self._application.send_task(TASK, args=[job_id], queue=QUEUES[kind], retry=False, expires=3_600)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("doorbell_not_delivered", job=job_id, reason=type(error).__name__)
            return False
        return True
