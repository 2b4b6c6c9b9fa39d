"""Requests and batches that wait for memory: vLLM's `RequestQueue`, in two parts."""

from collections.abc import Iterable

from worker.inference.engine.batch import Batch
from worker.inference.ipc import Generate


class DeferredRequests:
    """Requests that wait until nothing runs: their models need the memory of models in use. First come, first served,
    base by base."""

    def __init__(self) -> None:
        self._requests: list[Generate] = []

    def __len__(self) -> int:
        return len(self._requests)

    def extend(self, requests: Iterable[Generate]) -> None:
        """Add requests behind the deferred ones."""
        self._requests.extend(requests)

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is deferred."""
        self._requests = [request for request in self._requests if request.id != request_id]

    def take_oldest(self) -> list[Generate]:
        """Remove the oldest request and those over the same base, and return them. There must be one."""
        digest, requests = self._requests[0].model.base_digest, self._requests
        self._requests = [request for request in requests if request.model.base_digest != digest]
        return [request for request in requests if request.model.base_digest == digest]


class MemoryWaitlist:
    """Batches whose next request does not fit into memory yet. No other batch starts requests before the first of them,
    so a large request is not starved by small ones."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []

    @property
    def first(self) -> Batch | None:
        """The batch whose next request starts first."""
        return self._batches[0] if self._batches else None

    def join(self, batch: Batch) -> None:
        """Put a batch behind the others, unless it is in the list."""
        if batch not in self._batches:
            self._batches.append(batch)

    def leave(self, batch: Batch) -> None:
        """Remove a batch, if it is in the list."""
        self._batches = [other for other in self._batches if other is not batch]

    def drop_idle(self) -> None:
        """Remove the batches in which no request waits any more."""
        self._batches = [other for other in self._batches if other.waiting]

    def try_pass(self, batch: Batch) -> bool:
        """Whether no other batch comes first. If one does, this batch joins the list."""
        may_pass = self.first in (None, batch)
        if not may_pass:
            self.join(batch)
        return may_pass
