"""The requests of one continuous batch: those that wait, and those that prefill or decode in a row of its KV cache."""

from collections import OrderedDict, deque
from collections.abc import Hashable

from worker.inference.cache.forward_batch import PrefillChunk
from worker.inference.cache.kv_cache import KVCache
from worker.inference.engine.sequence import Sequence
from worker.inference.ipc import Generate


class Batch:
    """Sequences with one `key`: the base, and the adapter if it cannot share a forward with others.

    - `decoding` sequences have the first rows of `kv_cache`, in order; `prefilling` ones have the next.
    - `steps`: steps since the scheduler chose this batch.
    - `deterministic`: each request is computed in a step of its own.
    """

    def __init__(self, key: Hashable, base_digest: str, *, deterministic: bool = False) -> None:
        self.key, self.base_digest, self.deterministic = key, base_digest, deterministic
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.kv_cache: KVCache | None = None
        self.steps = 0
        self._waiting: OrderedDict[str, deque[Generate]] = OrderedDict()  # by served model

    @property
    def waiting(self) -> list[Generate]:
        """Requests without a row, in the order of their arrival, adapter by adapter."""
        return [request for queue in self._waiting.values() for request in queue]

    @property
    def running(self) -> list[Sequence]:
        """Sequences with a row."""
        return [*self.decoding, *self.prefilling]

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens of running sequences that are not computed yet."""
        return sum(len(sequence.prompt_ids) - sequence.num_computed_tokens for sequence in self.prefilling)

    @property
    def is_empty(self) -> bool:
        """Whether no request waits or runs."""
        return not (self.decoding or self.prefilling or self._waiting)

    @property
    def next_request(self) -> Generate:
        """The waiting request that starts next: adapters take turns. There must be one."""
        return next(iter(self._waiting.values()))[0]

    def enqueue(self, request: Generate) -> None:
        """Add a request to the waiting ones."""
        self._waiting.setdefault(request.model.digest, deque()).append(request)

    def pop_next_request(self) -> Generate:
        """Remove `next_request` and return it."""
        digest, queue = next(iter(self._waiting.items()))
        request = queue.popleft()
        self._waiting.move_to_end(digest)
        if not queue:
            del self._waiting[digest]
        return request

    def take_waiting(self) -> list[Generate]:
        """Remove all waiting requests and return them."""
        waiting = self.waiting
        self._waiting.clear()
        return waiting

    def cancel(self, request_id: str) -> None:
        """Drop a request, waiting or running."""
        for digest, queue in list(self._waiting.items()):
            if left := deque(request for request in queue if request.id != request_id):
                self._waiting[digest] = left
            else:
                del self._waiting[digest]
        for row, sequence in enumerate(self.running):
            if sequence.id == request_id:
                self.remove(row)
                return

    def remove(self, row: int) -> None:
        """Free a row; the last rows move, so that the first ones stay in use.

        A prefilling row may hold a NaN that is not noticed yet: it is zeroed before another sequence gets it.
        """
        if row < len(self.decoding):
            self._replace_by_last(self.decoding, row, 0)
            row = len(self.decoding)  # the gap between decoding and prefilling rows
            if self.prefilling:
                self._move(row + len(self.prefilling), row, self.prefilling[-1])
                self._zero(row + len(self.prefilling), self.prefilling[-1])
                self.prefilling.insert(0, self.prefilling.pop())
        else:
            last = len(self.running) - 1
            self._zero(row, self.running[row])
            moved = self._replace_by_last(self.prefilling, row - len(self.decoding), len(self.decoding))
            self._zero(last, moved)
        if self.kv_cache is not None:
            self.kv_cache.trim(max((sequence.num_computed_tokens for sequence in self.running), default=0))

    def plan_prefill(self, max_tokens: int) -> list[PrefillChunk]:
        """The next prompt tokens of the prefilling sequences, `max_tokens` in all, first come first served."""
        chunks, row = [], len(self.decoding)
        for sequence in self.prefilling:
            start = sequence.num_computed_tokens
            token_ids = sequence.prompt_ids[start : start + max_tokens]
            if not token_ids:
                break
            is_last = start + len(token_ids) == len(sequence.prompt_ids)
            num_logits = len(token_ids) if sequence.wants_prompt_logprobs else int(is_last)
            chunks.append(PrefillChunk(row, token_ids, start, num_logits))
            max_tokens -= len(token_ids)
            row += 1
        return chunks

    def promote_prefilled(self) -> None:
        """Let sequences decode whose prompt is computed: they are the first of the prefilling ones."""
        while self.prefilling and self.prefilling[0].is_prefilled:
            self.decoding.append(self.prefilling.pop(0))

    def clear(self) -> None:
        """Drop all requests and the KV cache."""
        self.decoding.clear()
        self.prefilling.clear()
        self._waiting.clear()
        self.kv_cache = None

    def _replace_by_last(self, sequences: list[Sequence], index: int, first_row: int) -> Sequence:
        """Remove one of the sequences that lie from `first_row` on. The last one takes its row, and is returned."""
        last = sequences.pop()
        if index < len(sequences):
            self._move(first_row + len(sequences), first_row + index, last)
            sequences[index] = last
        return last

    def _zero(self, row: int, sequence: Sequence) -> None:
        assert self.kv_cache is not None
        self.kv_cache.zero_row(row, sequence.num_computed_tokens)

    def _move(self, source: int, target: int, sequence: Sequence) -> None:
        assert self.kv_cache is not None
        self.kv_cache.copy_row(source, target, sequence.num_computed_tokens)
