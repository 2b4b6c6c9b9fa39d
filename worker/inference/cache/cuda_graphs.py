"""Steps that are recorded once and replayed: on a GPU, launching a step's kernels one by one takes several times as
long as they run. Knows no models and no requests.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

log = logging.getLogger(__name__)

Run = Callable[[], torch.Tensor]
"""Reads and writes the same tensors whenever it is called."""

Capture = Callable[[Run], Run]
"""Makes of such work what does it again."""

MAX_GRAPHS = 32
"""Graphs that one KV cache keeps. Each takes some megabytes."""


class CudaGraphCapturer:
    """Records the kernels that some work launches, once it has run before. Graphs share what memory they need in
    between, so the result of one is there until another one is replayed."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._able = True

    def __call__(self, run: Run) -> Run:
        if not self._able:  # a recording that failed may leave its pool unusable
            raise RuntimeError("an earlier step could not be recorded")
        self._able = False
        if not self._alive:  # a pool ends with the last recording that is in it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # A recording that fails does not put the stream back.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            out = run()
        self._alive.add(graph)
        self._able = True

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class CapturableStep:
    """Work on tensors [rows, …] shaped like `inputs` and filled with theirs, which may have fewer rows. It keeps what
    was recorded and not the work, with which models and adapters would stay in memory."""

    def __init__(self, record: Capture, rows: int, inputs: Sequence[torch.Tensor]) -> None:
        self._record = record
        self._inputs = [given.new_zeros(rows, *given.shape[1:]) for given in inputs]
        self._has_run = self._was_tried = False
        self._replay: Run | None = None

    def __call__(
        self,
        work: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        spare: Sequence[int],
        may_record: bool = True,
    ) -> torch.Tensor:
        """[rows of `inputs`, …]. Rows beyond theirs have the numbers `spare`, one for each input."""
        count = len(inputs[0])
        for kept, given, rest in zip(self._inputs, inputs, spare, strict=True):
            kept[:count] = given
            kept[count:] = rest
        run = partial(work, *self._inputs)
        # Not at once: kernels have to have run before, and what comes once is not worth it.
        if may_record and self._has_run and not self._was_tried:
            self._was_tried = True
            self._replay = self._recorded(run)
        self._has_run = True
        return (self._replay or run)()[:count].clone()

    def _recorded(self, run: Run) -> Run | None:
        try:
            return self._record(run)
        except RuntimeError as error:  # out of memory, too
            log.warning("a step cannot be recorded here and is slower than it might be: %s", error)
            return None


class CudaGraphCache:
    """Of one store's steps; the least recently used go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, CapturableStep] = OrderedDict()
        self._model: object = None
        self._places: object = None

    def find(self, read: tuple[object, object], key: Hashable, make: Callable[[], CapturableStep]) -> CapturableStep:
        """What was recorded under `key`, else what is made now. `read`: the model that is read, and its places, or None
        where it is read without: once one of them is another one, nothing is where it was."""
        model, places = read
        if model is not self._model or places not in (None, self._places):
            self.clear()
            self._model, self._places = model, places
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_GRAPHS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()
