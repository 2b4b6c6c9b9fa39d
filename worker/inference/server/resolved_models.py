"""The models that were asked for so far: a digest is resolved once, for all who ask meanwhile. Knows no HTTP."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from worker.inference.protocol import ServedModel

REMEMBERED = 4_096  # digests whose model is not asked for again


class ResolvedModels:
    """Digest → model. `resolve` is called in a thread. Lives on one event loop."""

    def __init__(self, resolve: Callable[[str], ServedModel]) -> None:
        self._resolve = resolve
        self._known: OrderedDict[str, ServedModel] = OrderedDict()
        self._asked: dict[str, asyncio.Task[ServedModel]] = {}

    def models(self) -> list[ServedModel]:
        """Those that are known."""
        return list(self._known.values())

    async def find(self, digest: str) -> ServedModel:
        """The model. Raises what `resolve` does."""
        if digest in self._known:
            return self._known[digest]
        if digest not in self._asked:
            self._asked[digest] = asyncio.create_task(self._ask(digest))
        return await asyncio.shield(self._asked[digest])  # others wait for it, too

    def forget(self, digest: str) -> None:
        """Have it resolved anew when it is asked for next."""
        self._known.pop(digest, None)

    async def _ask(self, digest: str) -> ServedModel:
        try:
            model = self._known[digest] = await asyncio.to_thread(self._resolve, digest)
        finally:
            del self._asked[digest]
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return model
