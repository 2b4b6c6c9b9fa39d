"""The requests that one batch can answer: who waits, whose prompt is being read, who decodes, and in which row of the
store. Knows no models and decides nothing.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable

from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.sequence import Sequence
from worker.inference.ipc import Generate


class Batch:
    """`live` sequences have the first rows of `store`, in their order; those that are being read have the next.

    `steps`: turns since the group was chosen. `solitary`: whether each of its requests is answered by itself.
    """

    def __init__(self, lane: Hashable, base_digest: str, *, solitary: bool = False) -> None:
        self.lane, self.base_digest, self.solitary = lane, base_digest, solitary
        self.live: list[Sequence] = []
        self.reading: list[Sequence] = []
        self.store: KVCache | None = None
        self.steps = 0
        self._waiting: OrderedDict[str, deque[Generate]] = OrderedDict()

    @property
    def waiting(self) -> list[Generate]:
        """In the order in which they came, adapter by adapter."""
        return [request for queue in self._waiting.values() for request in queue]

    @property
    def seated(self) -> list[Sequence]:
        """Those that have a row."""
        return [*self.live, *self.reading]

    @property
    def unread(self) -> int:
        """Tokens of prompts that are still to be read for those that have a row."""
        return sum(len(sequence.prompt) - sequence.length for sequence in self.reading)

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

    def turn_away(self) -> list[Generate]:
        """Those that wait, who wait here no longer."""
        waiting = self.waiting
        self._waiting.clear()
        return waiting

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is."""
        for digest, queue in list(self._waiting.items()):
            if left := deque(request for request in queue if request.id != request_id):
                self._waiting[digest] = left
            else:
                del self._waiting[digest]
        for row, sequence in enumerate(self.seated):
            if sequence.id == request_id:
                self.leave(row)
                return

    def leave(self, row: int) -> None:
        """Free a row; others move so that the first rows stay the ones in use. Nobody knows yet whether what is being
        read is finite: it stays in no row that others get."""
        if row < len(self.live):
            self._fill(self.live, row, 0)
            row = len(self.live)  # which the first of those being read has now to fill
            if self.reading:
                self._move(row + len(self.reading), row, self.reading[-1])
                self._wipe(row + len(self.reading), self.reading[-1])
                self.reading.insert(0, self.reading.pop())
        else:
            last = len(self.seated) - 1
            self._wipe(row, self.seated[row])
            moved = self._fill(self.reading, row - len(self.live), len(self.live))
            self._wipe(last, moved)
        if self.store is not None:
            self.store.trim(max((sequence.length for sequence in self.seated), default=0))

    def promote(self) -> None:
        """Whoever's prompt is read decodes from now on: they come first among those being read."""
        while self.reading and self.reading[0].length == len(self.reading[0].prompt):
            self.live.append(self.reading.pop(0))

    def clear(self) -> None:
        self.live.clear()
        self.reading.clear()
        self._waiting.clear()

    def _fill(self, among: list[Sequence], place: int, first: int) -> Sequence:
        """Take one out of a run of rows that starts at `first`; its last one takes that row, and is returned."""
        last = among.pop()
        if place < len(among):
            self._move(first + len(among), first + place, last)
            among[place] = last
        return last

    def _wipe(self, row: int, sequence: Sequence) -> None:
        assert self.store is not None
        self.store.clear(row, sequence.length)

    def _move(self, source: int, target: int, sequence: Sequence) -> None:
        assert self.store is not None
        self.store.move(source, target, sequence.length)
