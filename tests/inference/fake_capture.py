"""A CUDA graph's behaviour without a GPU: the operations of a run are captured, and replayed on the same memory."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.inference.cache.cuda_graphs import Run


class _CapturedOps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its subclass hook is untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeCapture:
    """A `Capture`. Counts captures and replays. If `fails` is set, it raises torch's error."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self.fails = False

    def __call__(self, run: Run) -> Run:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        with _CapturedOps() as ops:
            out = run()
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            for func, args, kwargs, made in ops.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
            return out

        return replay
