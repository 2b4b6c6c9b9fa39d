"""The models that requests have named so far. A digest is resolved once, for all requests that wait for it."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from worker.inference.sampling_params import ServedModel

MAX_RESOLVED = 4_096  # an LRU


class ResolvedModels:
    """Digest → model. `resolve` runs in a thread. All methods run on one event loop."""

    def __init__(self, resolve: Callable[[str], ServedModel]) -> None:
        self._resolve = resolve
        self._resolved: OrderedDict[str, ServedModel] = OrderedDict()
        self._resolving: dict[str, asyncio.Task[ServedModel]] = {}

    def list_models(self) -> list[ServedModel]:
        """All resolved models."""
        return list(self._resolved.values())

    async def resolve(self, digest: str) -> ServedModel:
        """The model. Raises what the `resolve` function does."""
        if digest in self._resolved:
            return self._resolved[digest]
        if digest not in self._resolving:
            self._resolving[digest] = asyncio.create_task(self._resolve_in_thread(digest))
        return await asyncio.shield(self._resolving[digest])  # other requests wait for it, too

    def invalidate(self, digest: str) -> None:
        """Resolve this digest again when a request names it next."""
        self._resolved.pop(digest, None)

    async def _resolve_in_thread(self, digest: str) -> ServedModel:
        try:
            model = self._resolved[digest] = await asyncio.to_thread(self._resolve, digest)
        finally:
            del self._resolving[digest]
        if len(self._resolved) > MAX_RESOLVED:
            self._resolved.popitem(last=False)
        return model
