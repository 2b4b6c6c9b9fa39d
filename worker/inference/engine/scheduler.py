"""Continuous batching: which batch steps next, and which waiting requests start in it.

- Requests over one base share a batch if their adapters can share a forward; adapters take turns in starting.
- Prompts are computed in chunks, in the same steps in which other sequences decode (chunked prefill).
- Batches take turns, and share the rows: none starves.
- Requests that do not fit into memory yet wait in a waitlist, or are deferred until nothing runs (`request_queue`).
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable

import torch

from worker.inference.cache.kv_cache_pool import KVCachePool
from worker.inference.cache.prefix_cache import PrefixCache
from worker.inference.engine.admission import Admission, Admitted, Refuse, Started, Wait
from worker.inference.engine.base_loader import BaseLoader, PendingLoad
from worker.inference.engine.batch import Batch
from worker.inference.engine.failures import failed_message
from worker.inference.engine.grammar import GrammarCache
from worker.inference.engine.model_runner import ModelRunner, last_position_logits
from worker.inference.engine.prefix_reuse import restore_prefix, store_prefix
from worker.inference.engine.request_queue import DeferredRequests, MemoryWaitlist
from worker.inference.engine.sequence import Sequence
from worker.inference.ipc import EngineOutput, EngineSettings, Failed, Generate, Stats
from worker.inference.model.base import Base
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.model.memory_use import budget
from worker.inference.sampling_params import ServedModel

log = logging.getLogger(__name__)

PREFILL_CHUNK_TOKENS = 256
"""Prompt tokens that one step computes at most, over all sequences of its batch (chunked prefill)."""


class Scheduler:
    """Owns models and caches. Call `step` while `has_work`, and after each `on_loaded`, which comes from another
    thread. All other calls are cheap."""

    def __init__(
        self,
        models: LoadedModels,
        settings: EngineSettings,
        send: Callable[[EngineOutput], None],
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._models, self._settings, self._send = models, settings, send
        self._loader = BaseLoader(models, on_loaded)
        self._batches: OrderedDict[Hashable, Batch] = OrderedDict()
        self._deferred = DeferredRequests()
        self._memory_waitlist = MemoryWaitlist()
        self._preloads: list[ServedModel] = []
        self._grammars = GrammarCache(settings.max_grammars)
        memory = budget(settings, models.device)
        self._kv_caches = KVCachePool(memory.kv_cache, models.device)
        self._prefixes = PrefixCache(memory.prefix_cache)
        self._admission = Admission(models, self._loader, self._kv_caches, self._batches)
        self._runner = ModelRunner(models)
        self._counters: defaultdict[str, int] = defaultdict(int)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        needs_idle_loader = bool(self._deferred or self._preloads) and not self._loader.is_loading
        return bool(self._batches) or self._loader.has_finished or needs_idle_loader

    @property
    def is_loading(self) -> bool:
        """Whether a base is being loaded."""
        return self._loader.is_loading

    @property
    def stats(self) -> Stats:
        """Gauges now, and counters since the start."""
        queued = sum(len(batch.waiting) for batch in self._batches.values())
        return Stats(
            running=self._num_running,
            waiting=queued + len(self._deferred) + self._loader.num_waiting,
            adapters=self._models.num_adapters,
            bases=self._models.num_bases,
            prefix_cache_bytes=self._prefixes.num_bytes,
            **self._counters,
        )

    def add(self, request: Generate) -> None:
        """Queue a request. Behind a deferred one it is deferred, too: otherwise the deferred one might never fit."""
        if self._deferred:
            self._deferred.extend([request])
        else:
            self._admit(request)

    def preload(self, model: ServedModel) -> None:
        """Load a model as soon as no request runs or waits, if it fits without evicting another."""
        self._preloads.append(model)

    def cancel(self, request_id: str) -> None:
        """Drop a request, wherever it is. Its row is free at once."""
        self._deferred.cancel(request_id)
        self._loader.cancel(request_id)
        for batch in list(self._batches.values()):
            batch.cancel(request_id)
            self._drop_if_empty(batch)

    def step(self) -> None:
        """Start what may start, and run one step of one batch; with no batch, preload a model."""
        self.finish_loads()
        if self._deferred and not self._batches and not self._loader.is_loading:
            self._readmit_deferred()
        batch = self._next_batch()
        if batch is not None:
            self._run(batch)
        elif self._preloads and not self._batches and not self._loader.is_loading:
            self._preload(self._preloads.pop(0))

    def finish_loads(self) -> None:
        """Admit the requests whose base has been loaded; refuse those whose base could not be."""
        for load in self._loader.collect_finished():
            for request in load.waiting:
                if load.error is None:
                    self._admit(request)
                else:
                    self._refuse(request.id, load.error)
            if not load.waiting:
                self._finish_preload(load)

    @property
    def _num_running(self) -> int:
        return sum(len(batch.running) for batch in self._batches.values())

    def _admit(self, request: Generate) -> None:
        match self._admission.try_admit(request):
            case Admitted(tokenized, key):
                deterministic = request.sampling.deterministic
                batch = Batch(key, request.model.base_digest, deterministic=deterministic)
                self._batches.setdefault(key, batch).enqueue(tokenized)
            case Wait(is_loading):
                if not is_loading:
                    self._defer(request)
            case Refuse(error):
                self._refuse(request.id, error)

    def _defer(self, request: Generate) -> None:
        """Let a request wait until nothing runs: its model needs the memory of models in use. All waiting requests are
        deferred behind it."""
        self._deferred.extend([request])
        for batch in list(self._batches.values()):
            self._deferred.extend(batch.take_waiting())
            self._drop_if_empty(batch)

    def _readmit_deferred(self) -> None:
        """Admit the oldest deferred request, and those over the same base. The others wait on."""
        for request in self._deferred.take_oldest():
            self._admit(request)

    def _next_batch(self) -> Batch | None:
        """The batch to step: the waitlist's first if its next request fits now, else the first that runs something."""
        started = [first] if (first := self._memory_waitlist.first) and self._start_waiting(first) else []
        for batch in [*started, *self._batches.values()]:
            self._start_waiting(batch)
            if batch.running:
                return batch
            self._drop_if_empty(batch)
        return None

    def _start_waiting(self, batch: Batch) -> bool:
        """Start waiting requests while it is the batch's turn, they fit, and less than a chunk is to be prefilled.
        Returns whether one started."""
        num_before = len(batch.running)
        while batch.num_prefill_tokens < PREFILL_CHUNK_TOKENS and self._has_turn(batch) and self._start_next(batch):
            pass
        return len(batch.running) > num_before

    def _has_turn(self, batch: Batch) -> bool:
        """Whether a row is free for the batch's next request. Where several batches wait, each has an equal share."""
        self._memory_waitlist.drop_idle()
        if (
            not batch.waiting
            or self._num_running >= self._settings.max_batch
            or (batch.deterministic and batch.running)
        ):
            return False
        others_wait = any(other.waiting for other in self._batches.values() if other is not batch)
        if others_wait and len(batch.running) >= max(1, self._settings.max_batch // len(self._batches)):
            self._memory_waitlist.leave(batch)
            return False
        return self._memory_waitlist.try_pass(batch)

    def _start_next(self, batch: Batch) -> bool:
        """Take the batch's next request from its queue: start it, refuse it, or defer it. False if it waits."""
        match self._admission.try_start(batch):
            case Started(base, kv_cache):
                batch.kv_cache = kv_cache
                self._start(batch, batch.pop_next_request(), base)
            case Refuse(error):
                self._refuse(batch.pop_next_request().id, error)
            case Wait():
                if self._num_running:
                    self._memory_waitlist.join(batch)
                else:
                    self._defer(batch.pop_next_request())
                return False
        self._memory_waitlist.leave(batch)
        return True

    def _start(self, batch: Batch, request: Generate, base: Base) -> None:
        """Give a request a row, and restore what the prefix cache has of its prompt."""
        try:
            sequence = Sequence(request, base, self._grammars)
            restore_prefix(self._prefixes, batch, sequence)
        except Exception as error:
            self._refuse(request.id, error)
        else:
            batch.prefilling.append(sequence)
            num_prompt, num_hits = len(sequence.prompt_ids), sequence.num_cached_tokens
            self._count(prefills=1, prompt_tokens=num_prompt, prefix_queries=num_prompt, prefix_hits=num_hits)

    def _run(self, batch: Batch) -> None:
        """One step. If it fails, all requests of the batch fail."""
        batch.steps += 1
        try:
            self._run_step(batch)
        except Exception as error:
            log.exception("a step over base %s failed", batch.base_digest)
            message = f"the engine failed on this batch: {type(error).__name__}"
            for request_id in [*(s.id for s in batch.running), *(request.id for request in batch.waiting)]:
                self._send(Failed(id=request_id, status=500, message=message))
            batch.clear()
            self._kv_caches.release([batch.key])  # its contents are undefined
        self._drop_if_empty(batch)
        if batch.key in self._batches and batch.steps >= self._settings.slice_steps:
            batch.steps = 0
            self._batches.move_to_end(batch.key)

    def _run_step(self, batch: Batch) -> None:
        chunks = batch.plan_prefill(PREFILL_CHUNK_TOKENS)
        num_decoding = len(batch.decoding)
        logits = self._runner.execute(batch, chunks)
        for sequence in batch.decoding:
            sequence.num_computed_tokens += 1
        logits_per_row = [1] * num_decoding + [chunk.num_logits for chunk in chunks]
        prefill_logits = torch.split(logits, logits_per_row)[num_decoding:]
        for sequence, chunk, rows in zip(batch.prefilling, chunks, prefill_logits, strict=False):
            sequence.add_computed(len(chunk.token_ids), rows)
        batch.promote_prefilled()
        self._count(decode_steps=bool(num_decoding), generation_tokens=len(batch.decoding))
        last = last_position_logits(logits, logits_per_row[: len(batch.decoding)])
        for row in reversed(range(len(batch.decoding))):  # backwards: a removed row is replaced by one already sampled
            self._sample(batch, row, last[row])

    def _sample(self, batch: Batch, row: int, logits: torch.Tensor) -> None:
        """Sample a row's next token, and send what is settled."""
        sequence = batch.decoding[row]
        try:
            sequence.sample_next(logits)
        except Exception as error:
            self._refuse(sequence.id, error)
            if batch.kv_cache is not None:
                batch.kv_cache.zero_row(row, sequence.num_computed_tokens)
            batch.remove(row)
            return
        if sequence.finish_reason is not None:
            self._send(sequence.finished_message())
            store_prefix(self._prefixes, batch, row)
            batch.remove(row)
        elif sequence.stream:
            self._send(sequence.next_chunk())

    def _drop_if_empty(self, batch: Batch) -> None:
        if not batch.is_empty:
            return
        self._memory_waitlist.leave(batch)
        if self._batches.pop(batch.key, None) is None:
            return
        if self._batches:
            self._kv_caches.release([batch.key])
        else:
            self._kv_caches.retire(batch.key)

    def _preload(self, model: ServedModel) -> None:
        try:
            self._admission.try_preload(model)
        except Exception as error:  # a request for it gets the reason
            log.warning("model %s could not be preloaded: %s", model.digest, error)

    def _finish_preload(self, load: PendingLoad) -> None:
        """A base that no request waits for has been loaded: its adapter comes next."""
        if load.error is None:
            self._preloads.insert(0, load.model)
        else:
            log.warning("model %s could not be preloaded: %s", load.model.digest, load.error)

    def _refuse(self, request_id: str, error: BaseException) -> None:
        """Fail one request with the reason. The others go on."""
        self._send(failed_message(request_id, error))

    def _count(self, **more: int) -> None:
        for name, value in more.items():
            self._counters[name] += value
