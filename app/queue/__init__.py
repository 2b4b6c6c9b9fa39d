"""Handing committed work to workers: a doorbell. The database is the truth; a lost ring only costs a poll."""

from app.queue.base import Doorbell
from app.queue.celery import CeleryDoorbell
from app.queue.memory import MemoryDoorbell

__all__ = ["CeleryDoorbell", "Doorbell", "MemoryDoorbell"]
