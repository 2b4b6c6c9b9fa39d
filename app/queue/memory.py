"""The doorbell within one process: it calls its listeners. For embedding and tests."""

from collections.abc import Callable

from app.domain.specs import JobKind


class MemoryDoorbell:
    def __init__(self) -> None:
        self._listeners: list[Callable[[str, JobKind], None]] = []

    def listen(self, listener: Callable[[str, JobKind], None]) -> None:
        self._listeners.append(listener)

    def ring(self, job_id: str, kind: JobKind) -> bool:
        for listener in self._listeners:
            listener(job_id, kind)
        return bool(self._listeners)
