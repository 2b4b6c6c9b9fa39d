"""How large a micro-batch may be on this device: what was planned, and half of it whenever memory did not suffice.

The effective batch stays: an update is begun again with more and smaller micro-batches.
"""

import ctypes
import gc
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from app.domain.attempts import EncodedRow
from worker.training.batches import MicroBatch, collate

MESSAGES = ("can't allocate memory", "out of memory", "could not create a primitive")
"""How a CPU's allocator and its kernels say it."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)


def smaller(batches: Sequence[MicroBatch]) -> int | None:
    """Tokens of a micro-batch that is half as large as the largest of `batches` that can be divided; None when each
    is a single row."""
    sizes = [batch.tokens for batch in batches if len(batch.rows) > 1]
    return max(sizes) // 2 if sizes else None


def suffices(work: Callable[[], None]) -> bool:
    """Do `work`; False when memory did not suffice for it, and what it held is given back."""
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # Behind the handler: the error's traceback holds the tensors that are in the way.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def worst_batch(rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int) -> MicroBatch:
    """The heaviest micro-batch that these limits allow: the longest row over and over."""
    longest = max(rows, key=lambda row: len(row.all_ids))
    count = max(1, min(max_tokens // len(longest.all_ids), max_rows or max_tokens))
    return collate([longest] * count)


def largest_that_fits(
    run: Callable[[MicroBatch], None], rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int
) -> int:
    """Tokens of the largest micro-batch that `run` has room for at its worst: `max_tokens`, or half of it, and so on
    down to a single row."""
    while True:
        batch = worst_batch(rows, max_rows, max_tokens)
        if suffices(partial(run, batch)) or (half := smaller([batch])) is None:
            return max_tokens
        max_tokens = half


def return_free_memory() -> None:
    """Give the heap's free pages back to the system. Loading a base leaves up to 1 GB of them, a different amount in
    each run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def peak_resident_bytes() -> int:
    """The most resident memory that this process ever had, mapped files included.

    `ru_maxrss` may hold the parent's memory: a child that was started by vfork takes it over.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
