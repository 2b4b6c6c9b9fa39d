"""A worker's slot: one attempt at a time, started by the doorbell's task or by the polling thread."""

import threading
import time

import structlog

from app.composition import Services
from app.domain.errors import VerituneError
from worker.device import describe_device
from worker.supervisor import Supervisor

REPORT_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
"""Seconds between deletions of expired checkpoints and of deleted adapters' files."""

log = structlog.get_logger(__name__)


class Slot:
    def __init__(self, services: Services, supervisor: Supervisor, name: str, queues: tuple[str, ...]) -> None:
        self._services = services
        self._supervisor = supervisor
        self._name = name
        self._queues = queues
        self._busy = threading.Lock()
        self._over = threading.Event()

    def drain(self) -> None:
        """Run jobs until there is none. If the slot is busy, do nothing: its thread will look again."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            while self._supervisor.work():
                pass
            self._supervisor.warm_up()
        finally:
            self._busy.release()

    def start(self) -> None:
        """Start the threads that poll and report. They need no broker."""
        threading.Thread(target=self._poll, name="poll", daemon=True).start()
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def leave(self) -> None:
        """Lease no more jobs and requeue the running one. Returns once the slot is free."""
        self._over.set()
        self._supervisor.leave()
        with self._busy:
            self._supervisor.dismiss()

    def _poll(self) -> None:
        swept = -EXPIRE_SECONDS
        while not self._over.wait(self._services.settings.poll_seconds):
            try:
                if time.monotonic() - swept >= EXPIRE_SECONDS:
                    swept = time.monotonic()
                    self._services.checkpoints.expire(self._services.settings.checkpoint_ttl_hours)
                    self._services.adapters.sweep()
                self.drain()
            except VerituneError as error:
                log.warning("poll_failed", reason=error.detail)
            except Exception:
                log.exception("poll_broke")
                time.sleep(1)  # a repeated fault must not use up a core

    def _report(self) -> None:
        while True:
            try:
                self._services.devices.report(self._name, describe_device(self._queues))
            except VerituneError as error:
                log.warning("device_report_failed", reason=error.detail)
            if self._over.wait(REPORT_SECONDS):
                return
