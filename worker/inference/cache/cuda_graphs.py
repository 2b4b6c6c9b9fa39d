"""CUDA graphs of decode steps: captured once, replayed for every later step of the same shape.

On a GPU, launching a step's kernels one by one takes several times as long as running them.
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
"""Reads and writes the same tensors at every call."""

Capture = Callable[[Run], Run]
"""Captures a run; what it returns replays the run."""

MAX_GRAPHS = 32
"""Graphs that one KV cache keeps. Each takes some megabytes."""


class CudaGraphCapturer:
    """Captures the kernels that a run launches. The run must have run once before.

    Graphs share one memory pool, so a replay's result is valid until the next replay.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._usable = True

    def __call__(self, run: Run) -> Run:
        if not self._usable:  # a failed capture may leave the pool unusable
            raise RuntimeError("an earlier step could not be captured")
        self._usable = False
        if not self._alive:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream: a failed capture does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            out = run()
        self._alive.add(graph)
        self._usable = True

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class CapturableStep:
    """Work over fixed input tensors: run eagerly the first time, captured the second time, replayed from then on.

    It keeps the graph and not the work, which would keep models and adapters in memory.
    """

    def __init__(self, capture: Capture, num_rows: int, inputs: Sequence[torch.Tensor]) -> None:
        """`inputs`: examples [rows, …] of the tensors to allocate with `num_rows` rows."""
        self._capture = capture
        self._inputs = [example.new_zeros(num_rows, *example.shape[1:]) for example in inputs]
        self._has_run = self._was_tried = False
        self._replay: Run | None = None

    def __call__(
        self,
        work: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        padding: Sequence[int],
        may_capture: bool = True,
    ) -> torch.Tensor:
        """The result's first rows, as many as `inputs` have. Further rows of each input are filled with its number in
        `padding`."""
        count = len(inputs[0])
        for buffer, given, pad in zip(self._inputs, inputs, padding, strict=True):
            buffer[:count] = given
            buffer[count:] = pad
        run = partial(work, *self._inputs)
        # The second time: kernels must have run before, and a shape that comes once is not worth a capture.
        if may_capture and self._has_run and not self._was_tried:
            self._was_tried = True
            self._replay = self._try_capture(run)
        self._has_run = True
        return (self._replay or run)()[:count].clone()

    def _try_capture(self, run: Run) -> Run | None:
        try:
            return self._capture(run)
        except RuntimeError as error:  # out of memory is one
            log.warning("a decode step could not be captured as a CUDA graph and runs eagerly, slower: %s", error)
            return None


class CudaGraphCache:
    """The captured steps of one KV cache, an LRU."""

    def __init__(self) -> None:
        self._steps: OrderedDict[Hashable, CapturableStep] = OrderedDict()
        self._model: object = None
        self._slots: object = None

    def get_or_create(
        self, reads: tuple[object, object], key: Hashable, create: Callable[[], CapturableStep]
    ) -> CapturableStep:
        """The step under `key`, created if there is none.

        `reads` identifies the model and the slot buffer that the step reads; the latter is None without adapters. If
        either changed, captured pointers are stale: all graphs are dropped.
        """
        model, slots = reads
        if model is not self._model or slots not in (None, self._slots):
            self.clear()
            self._model, self._slots = model, slots
        if key not in self._steps:
            self._steps[key] = create()
        self._steps.move_to_end(key)
        if len(self._steps) > MAX_GRAPHS:
            self._steps.popitem(last=False)
        return self._steps[key]

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Drop all graphs."""
        self._steps.clear()
