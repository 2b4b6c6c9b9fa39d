"""The requests that one batch can answer: who waits, whose prompt is being read, who decodes, and in which row of the
store. Knows no models and decides nothing.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable

from worker.inference.kv import KeyValues
from worker.inference.sequence import Sequence
from worker.inference.wire import Generate


class Group:
    """`live` sequences have the first rows of `store`, in their order; the one that is being read has the next.

    `read`: tokens of prompts since the last decode step. `steps`: turns since the group was chosen.
    """

    def __init__(self, lane: Hashable, base_digest: str) -> None:
        self.lane, self.base_digest = lane, base_digest
        self.live: list[Sequence] = []
        self.reading: Sequence | None = None
        self.store: KeyValues | None = None
        self.read = self.steps = 0
        self._waiting: OrderedDict[str, deque[Generate]] = OrderedDict()

    @property
    def waiting(self) -> list[Generate]:
        """In the order in which they came, adapter by adapter."""
        return [request for queue in self._waiting.values() for request in queue]

    @property
    def seated(self) -> list[Sequence]:
        """Those that have a row."""
        return [*self.live, *([] if self.reading is None else [self.reading])]

    @property
    def idle(self) -> bool:
        return not (self.live or self.reading or self._waiting)

    @property
    def next(self) -> Generate:
        """Who joins next: adapters take turns. There must be one."""
        return next(iter(self._waiting.values()))[0]

    def wait(self, request: Generate) -> None:
        self._waiting.setdefault(request.model.digest, deque()).append(request)

    def take(self) -> Generate:
        """The next one, which waits no longer."""
        digest, queue = next(iter(self._waiting.items()))
        request = queue.popleft()
        self._waiting.move_to_end(digest)
        if not queue:
            del self._waiting[digest]
        return request

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is."""
        for digest, queue in list(self._waiting.items()):
            if left := deque(request for request in queue if request.id != request_id):
                self._waiting[digest] = left
            else:
                del self._waiting[digest]
        if self.reading is not None and self.reading.id == request_id:
            self.reading = None
        for row, sequence in enumerate(self.live):
            if sequence.id == request_id:
                self.leave(row)
                return

    def leave(self, row: int) -> None:
        """Free the row of a live sequence; others move so that the first rows stay the ones in use."""
        last = self.live.pop()
        behind = len(self.live)
        if row < behind:
            self._move(behind, row, last)
            self.live[row] = last
        if self.reading is not None:
            self._move(behind + 1, behind, self.reading)

    def clear(self) -> None:
        self.live.clear()
        self.reading = None
        self._waiting.clear()

    def _move(self, source: int, target: int, sequence: Sequence) -> None:
        assert self.store is not None
        self.store.move(source, target, sequence.length)
