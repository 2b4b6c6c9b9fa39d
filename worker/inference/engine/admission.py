"""Decides whether a request fits into memory now: its base, its adapter, its adapter's slot, and its KV cache.

There are two gates. `try_admit` lets an arriving request queue: its model is loaded, and it would fit if it ran alone.
`try_start` lets the next queued request of a batch run beside the running ones: it reserves what the request needs.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from worker.inference.cache.kv_cache import KVCache
from worker.inference.cache.kv_cache_pool import KVCachePool
from worker.inference.engine.base_loader import BaseLoader
from worker.inference.engine.batch import Batch
from worker.inference.engine.sequence import tokenize_prompt
from worker.inference.errors import OutOfMemory, RequestError
from worker.inference.ipc import Generate
from worker.inference.model.base import Base
from worker.inference.model.loaded_models import LoadedModels
from worker.inference.sampling_params import ServedModel


class Admitted(NamedTuple):
    """The request, tokenized, may queue in the batch with this key."""

    request: Generate
    batch_key: Hashable


class Started(NamedTuple):
    """The batch's next request may run: over `base`, with a row in `kv_cache`."""

    base: Base
    kv_cache: KVCache


class Wait(NamedTuple):
    """The request fits later: once its base is loaded (`is_loading`), or once running requests have finished."""

    is_loading: bool = False


class Refuse(NamedTuple):
    """The request never fits, or its model is broken."""

    error: Exception


class Admission:
    """`batches` are the scheduler's, by key: what they run is in use and is not evicted."""

    def __init__(
        self, models: LoadedModels, loader: BaseLoader, kv_caches: KVCachePool, batches: Mapping[Hashable, Batch]
    ) -> None:
        self._models, self._loader, self._kv_caches, self._batches = models, loader, kv_caches, batches

    def try_admit(self, request: Generate) -> Admitted | Wait | Refuse:
        """Load the request's model and tokenize its prompt. While its base is loading, the loader keeps the request."""
        try:
            if not self._models.has_base(request.model):
                self._loader.start(request.model, self._in_use, self._bases_in_use).waiting.append(request)
                return Wait(is_loading=True)
            base = self._models.load(request.model, self._in_use, self._bases_in_use)
            tokenized = tokenize_prompt(request, base)
            self._check_fits_alone(tokenized, base)
            key = (self._models.batch_key(request.model), request.sampling.deterministic)
        except OutOfMemory:
            return Wait()
        except Exception as error:
            return Refuse(error)
        return Admitted(tokenized, key)

    def try_start(self, batch: Batch) -> Started | Wait | Refuse:
        """Reserve KV cache and adapter slot for the batch's next request, beside all running ones."""
        request = batch.next_request
        try:
            base = self._models.load(request.model, self._in_use, self._bases_in_use)
            kv_cache = self._try_allocate(batch, base, max_length(request))
            if kv_cache is None:
                return Wait()
            if not batch.deterministic:
                running = [sequence.model for sequence in batch.running]
                self._models.reserve_slots(request.model, running, self._in_use, self._bases_in_use)
        except OutOfMemory:
            return Wait()
        except Exception as error:
            return Refuse(error)
        return Started(base, kv_cache)

    def try_preload(self, model: ServedModel) -> None:
        """Load a model if that evicts nothing; start loading its base first. Raises ModelError."""
        try:
            if self._models.has_base(model):
                self._models.load(model, may_evict=False)
            else:
                self._loader.start(model, may_evict=False)
        except OutOfMemory:
            return

    @property
    def _in_use(self) -> list[ServedModel]:
        return [sequence.model for batch in self._batches.values() for sequence in batch.running]

    @property
    def _bases_in_use(self) -> set[str]:
        """Including those that only waiting requests need."""
        return {batch.base_digest for batch in self._batches.values()}

    def _check_fits_alone(self, request: Generate, base: Base) -> None:
        length = max_length(request)
        if (needed := self._kv_caches.bytes_alone(base.kv_shape, length)) > self._kv_caches.budget:
            raise RequestError(
                f"The keys and values of {length} tokens take {needed / 1e9:.2f} GB here, and may have "
                f"{self._kv_caches.budget / 1e9:.2f} GB (VERITUNE_INFERENCE_MEMORY). Shorten the prompt or lower "
                "max_tokens.",
                "prompt",
            )

    def _try_allocate(self, batch: Batch, base: Base, length: int) -> KVCache | None:
        """A row more in the batch's cache. If the budget is exceeded, caches of batches that run nothing are freed."""
        num_rows = len(batch.running) + 1
        kv_cache = self._kv_caches.try_allocate(batch.key, base.kv_shape, num_rows, length)
        if kv_cache is None:
            idle = [other for other in self._batches.values() if not other.running]
            for other in idle:
                other.kv_cache = None
            self._kv_caches.release([other.key for other in idle])
            kv_cache = self._kv_caches.try_allocate(batch.key, base.kv_shape, num_rows, length)
        return kv_cache


def max_length(request: Generate) -> int:
    """Tokens of the prompt and of the longest completion. The request is tokenized."""
    return len(request.prompt) + request.sampling.max_tokens
