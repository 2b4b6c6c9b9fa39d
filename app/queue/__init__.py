"""The doorbell: it tells workers that a committed job waits. The database is the truth; a lost ring costs one poll."""

from app.queue.base import Doorbell
from app.queue.celery import CeleryDoorbell
from app.queue.memory import MemoryDoorbell

__all__ = ["CeleryDoorbell", "Doorbell", "MemoryDoorbell"]
