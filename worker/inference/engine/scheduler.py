"""Who decodes next: requests grouped by what one batch can answer, joining and leaving between decode steps.

Adapters over one base mix in a batch where they can; a group's adapters take turns in joining, prompts are read in
chunks in the same steps in which others decode, groups take turns and share the slots, and those that want more memory
than there is stand in line for it: so nobody starves. Knows no processes and no HTTP.
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator
from itertools import accumulate

import torch

from worker.inference.cache.kv_cache import PREFILL_CHUNK_TOKENS, PrefillChunk
from worker.inference.cache.kv_cache_pool import KVCachePool
from worker.inference.cache.prefix_cache import PrefixCache
from worker.inference.engine.base_loader import BaseLoader, PendingLoad
from worker.inference.engine.batch import Batch
from worker.inference.engine.grammar import GrammarCache
from worker.inference.engine.sequence import RequestError, Sequence, encoded
from worker.inference.ipc import EngineSettings, Failed, Generate, ServerMessage, Stats
from worker.inference.model.base import ModelError, OutOfMemory
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import budget
from worker.inference.protocol import ServedModel

log = logging.getLogger(__name__)


class Scheduler:
    """Owns the models and the caches. Call `turn` while `busy`, and look again after each `wake`, which comes from
    another thread; everything else is cheap."""

    def __init__(
        self,
        models: LoadedModels,
        settings: EngineSettings,
        send: Callable[[ServerMessage], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = models
        self._reader = BaseLoader(models, wake)
        self._settings = settings
        self._send = send
        self._groups: OrderedDict[Hashable, Batch] = OrderedDict()
        self._line: list[Batch] = []
        self._held: list[Generate] = []
        self._expected: list[ServedModel] = []
        self._grammars = GrammarCache(settings.max_grammars)
        bytes_of = budget(settings, models.device)
        self._stores = KVCachePool(bytes_of.live, models.device)
        self._prefixes = PrefixCache(bytes_of.prefixes)
        self._counts: defaultdict[str, int] = defaultdict(int)

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        unhurried = bool(self._held or self._expected) and not self._reader.busy
        return bool(self._groups) or self._reader.has_news or unhurried

    @property
    def reading(self) -> bool:
        """Whether a base is on its way."""
        return self._reader.busy

    @property
    def stats(self) -> Stats:
        """Gauges now, and counters since the start."""
        return Stats(
            running=self._running,
            waiting=sum(len(group.waiting) for group in self._groups.values()) + len(self._held) + self._reader.waiting,
            adapters=self._models.adapters,
            bases=self._models.bases,
            prefix_cache_bytes=self._prefixes.size,
            **self._counts,
        )

    def add(self, request: Generate) -> None:
        """Queue a request behind those of the same served model, which is loaded for it; or hold it, and whoever comes
        later, until there is room for that."""
        if self._held:
            self._held.append(request)
        else:
            self._admit(request)

    def _admit(self, request: Generate) -> None:
        try:
            if not self._models.has_base(request.model):
                self._reader.fetch(request.model, self._in_use(), self._groups_bases()).waiting.append(request)
                return
            base = self._models.load(request.model, self._in_use(), self._groups_bases())
            solitary = request.sampling.deterministic
            lane = (self._models.lane(request.model), solitary)
            waiting = encoded(request, base)
            self._stores.admit(waiting, base)
        except OutOfMemory:
            self._hold(request)
        except Exception as error:
            self._refuse(request.id, error)
        else:
            group = self._groups.setdefault(lane, Batch(lane, request.model.base_digest, solitary=solitary))
            group.wait(waiting)

    def expect(self, model: ServedModel) -> None:
        """Load a model once nobody is answered and nobody waits, if there is room for it then."""
        self._expected.append(model)

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        self._held = [request for request in self._held if request.id != request_id]
        self._reader.cancel(request_id)
        for group in list(self._groups.values()):
            group.cancel(request_id)
            self._dismiss_if_idle(group)

    def turn(self) -> None:
        """One step of a group: whoever may join begins, prompts are read a chunk further, the others decode. Without a
        group, what is expected is loaded."""
        self.settle()
        if self._held and not self._groups and not self._reader.busy:
            self._let_go()
        group = next(self._runnable(), None)
        if group is None:
            if self._expected and not self._reader.busy:
                self._meet(self._expected.pop(0))
            return
        group.steps += 1
        try:
            while group.unread < PREFILL_CHUNK_TOKENS and self._may_join(group):
                self._begin(group)
            if group.seated:
                self._step(group)
        except Exception as error:
            log.exception("a turn over %s failed", group.base_digest)
            self._fail_group(group, 500, f"the engine failed on this batch: {type(error).__name__}")
        self._pass_on(group)

    def settle(self) -> None:
        """Take in the bases that have been read, for those who wait for them."""
        for reading in self._reader.take_in():
            for request in reading.waiting:
                if reading.error is None:
                    self._admit(request)
                else:
                    self._refuse(request.id, reading.error)
            if not reading.waiting:
                self._met(reading)

    @property
    def _running(self) -> int:
        return sum(len(group.seated) for group in self._groups.values())

    def _runnable(self) -> Iterator[Batch]:
        """Whoever is first in line comes first once there is memory."""
        first = [group for group in self._line[:1] if self._may_join(group)]
        return (group for group in [*first, *self._groups.values()] if group.seated or self._may_join(group))

    def _in_use(self) -> list[ServedModel]:
        return [sequence.model for group in self._groups.values() for sequence in group.seated]

    def _groups_bases(self) -> set[str]:
        """Of those who wait, too."""
        return {group.base_digest for group in self._groups.values()}

    def _pass_on(self, group: Batch) -> None:
        self._dismiss_if_idle(group)
        if group.lane in self._groups and group.steps >= self._settings.slice_steps:
            group.steps = 0
            self._groups.move_to_end(group.lane)

    def _meet(self, model: ServedModel) -> None:
        try:
            if not self._models.has_room(model):
                return
            if self._models.has_base(model):
                self._models.load(model, [])
            else:
                self._reader.fetch(model, [], [])
        except Exception as error:  # whoever asks for it will be told
            log.warning("%s was expected and could not be loaded: %s", model.digest, error)

    def _met(self, reading: PendingLoad) -> None:
        """A base that nobody waits for: its adapter is what was expected."""
        if reading.error is None:
            self._expected.insert(0, reading.model)
        else:
            log.warning("%s was expected and could not be loaded: %s", reading.model.digest, reading.error)

    def _dismiss_if_idle(self, group: Batch) -> None:
        if not group.idle:
            return
        self._groups.pop(group.lane, None)
        self._leave_line(group)
        if not self._groups:
            self._stores.rest(group)

    def _hold(self, request: Generate) -> None:
        """Until those that run have made room; whoever else waits stands behind it, or it might never have its turn."""
        self._held.append(request)
        for group in list(self._groups.values()):
            self._held += group.turn_away()
            self._dismiss_if_idle(group)

    def _let_go(self) -> None:
        """Whoever waits longest for room has it now that nobody else is answered, and so have those over the same
        base; the others wait on."""
        digest, held = self._held[0].model.base_digest, self._held
        self._held = [request for request in held if request.model.base_digest != digest]
        for request in held:
            if request.model.base_digest == digest:
                self._admit(request)

    def _may_join(self, group: Batch) -> bool:
        """Whether the next request may be begun. Groups for whose next one there is no memory stand in line: it would
        never come to those that need much if others went on with little."""
        self._line = [other for other in self._line if other.waiting]
        if not group.waiting or self._running >= self._settings.max_batch or (group.solitary and group.seated):
            return False
        others_wait = any(other.waiting for other in self._groups.values() if other is not group)
        share = max(1, self._settings.max_batch // len(self._groups))
        has_share = others_wait and len(group.seated) >= share
        is_next = not self._line or self._line[0] is group
        joins = not has_share and is_next and (self._fits(group) or self._running == 0)
        if has_share:
            self._leave_line(group)
        elif not joins and group not in self._line:
            self._line.append(group)
        return joins

    def _leave_line(self, group: Batch) -> None:
        self._line = [other for other in self._line if other is not group]

    def _fits(self, group: Batch) -> bool:
        """Whether there is memory for the group's next request beside those that are answered."""
        request = group.next
        if not self._stores.have_room(group, self._groups.values()):
            for other in self._groups.values():
                other.store = other.store if other.seated else None
            if not self._stores.have_room(group, self._groups.values()):
                return False
        return self._models.has_places(request.model, _beside(group), self._in_use(), self._groups_bases())

    def _begin(self, group: Batch) -> None:
        """Give the next request a row, with what is known of its prompt's keys and values."""
        request = group.take()
        self._leave_line(group)
        try:
            group.reading.append(self._seat(group, request))
        except OutOfMemory:
            self._hold(request)
        except Exception as error:
            self._refuse(request.id, error)

    def _seat(self, group: Batch, request: Generate) -> Sequence:
        base = self._models.load(request.model, self._in_use(), self._groups_bases())
        self._models.make_places(request.model, _beside(group), self._in_use(), self._groups_bases())
        sequence = Sequence(request, base, self._grammars)
        row, ids = len(group.seated), sequence.prompt
        store = self._stores.seat(group, request, base)
        match = None if sequence.reads_all else self._prefixes.find(sequence.reads_as, ids)
        if match:
            sequence.cached = min(match.length, len(ids) - 1)  # the last token must be read for its logits
            store.restore(row, match.snapshot, sequence.cached)
        sequence.length = sequence.cached
        self._count(prefills=1, prompt_tokens=len(ids), prefix_queries=len(ids), prefix_hits=sequence.cached)
        return sequence

    def _step(self, group: Batch) -> None:
        assert group.store is not None
        reads = _reads(group)
        tokens = [sequence.tokens[-1] for sequence in group.live]
        answering = group.seated[: len(tokens) + len(reads)]
        forward = self._models.forward([sequence.model for sequence in answering], alone=group.solitary)
        logits = group.store.step(forward, tokens, [sequence.length for sequence in group.live], reads)
        for sequence in group.live:
            sequence.length += 1
        counts = [1] * len(tokens) + [read.kept for read in reads]
        for sequence, read, behind in zip(
            group.reading, reads, torch.split(logits, counts)[len(tokens) :], strict=False
        ):
            sequence.take_in(len(read.ids), behind)
        group.promote()
        self._count(decode_steps=bool(tokens), generation_tokens=len(group.live))
        last = _last(logits, counts[: len(group.live)])
        for row in reversed(range(len(group.live))):  # backwards: whoever leaves is replaced by one already seen
            self._advance(group, row, last[row])

    def _advance(self, group: Batch, row: int, logits: torch.Tensor) -> None:
        sequence = group.live[row]
        try:
            sequence.advance(logits)
        except Exception as error:
            self._refuse(sequence.id, error)
            if group.store is not None:
                group.store.clear(row, sequence.length)
            group.leave(row)
        else:
            self._report(group, row)

    def _report(self, group: Batch, row: int) -> None:
        sequence = group.live[row]
        if sequence.finish is not None:
            self._send(sequence.finished())
            self._remember(group, row)
            group.leave(row)
        elif sequence.stream:
            self._send(sequence.piece())

    def _remember(self, group: Batch, row: int) -> None:
        sequence = group.live[row]
        if sequence.sampling.deterministic:
            return
        read = sequence.tokens[: sequence.length]
        if group.store is not None and self._prefixes.worth_keeping(sequence.reads_as, read):
            self._prefixes.keep(sequence.reads_as, read, group.store.snapshot(row, len(read)))

    def _fail_group(self, group: Batch, status: int, message: str, param: str | None = None) -> None:
        for request_id in [*(s.id for s in group.seated), *(request.id for request in group.waiting)]:
            self._fail(request_id, status, message, param)
        group.clear()
        group.store = None  # nobody knows what it holds

    def _refuse(self, request_id: str, error: BaseException) -> None:
        """Say in words why one request has no answer; the others go on."""
        match error:
            case RequestError():
                self._fail(request_id, error.status, error.message, error.param)
            case ModelError():
                self._fail(request_id, 422, str(error), "model")
            case _:
                log.error("a request could not be answered", exc_info=error)
                self._fail(request_id, 500, f"the engine failed on this request: {type(error).__name__}")

    def _fail(self, request_id: str, status: int, message: str, param: str | None = None) -> None:
        self._send(Failed(id=request_id, status=status, message=message, param=param))

    def _count(self, **more: int) -> None:
        for name, value in more.items():
            self._counts[name] += value


def _beside(group: Batch) -> list[ServedModel] | None:
    """The models of those that its next request will be computed with; None where each is alone."""
    return None if group.solitary else [sequence.model for sequence in group.seated]


def _last(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The last ones of each of the first sequences, which have `counts` of them, [sequences, V]: where tokens are
    chosen, row by row, for each of which a GPU would be waited for several times."""
    if max(counts, default=1) == 1:
        return logits[: len(counts)].cpu()
    return logits[[end - 1 for end in accumulate(counts)]].cpu()


def _reads(group: Batch) -> list[PrefillChunk]:
    """The next tokens of the prompts that are being read, a chunk in all: who came first is read first."""
    reads, room, row = [], PREFILL_CHUNK_TOKENS, len(group.live)
    for sequence in group.reading:
        ids = sequence.prompt[sequence.length : sequence.length + room]
        if not ids:
            break
        ends = sequence.length + len(ids) == len(sequence.prompt)
        reads.append(PrefillChunk(row, ids, sequence.length, len(ids) if sequence.is_scored else int(ends)))
        room -= len(ids)
        row += 1
    return reads
