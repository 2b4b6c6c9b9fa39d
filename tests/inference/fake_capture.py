"""What a CUDA graph does, without a GPU: the operations of some work are recorded, and replayed on the same memory."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.inference.cache.cuda_graphs import Run


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its subclass hook is untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """A `Record`. `recorded` and `replayed` count; where it is `unable`, it says so as torch does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.unable = False

    def __call__(self, run: Run) -> Run:
        if self.unable:
            raise RuntimeError("operation not permitted when stream is capturing")
        with _Tape() as tape:
            out = run()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            for func, args, kwargs, made in tape.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
            return out

        return replay
