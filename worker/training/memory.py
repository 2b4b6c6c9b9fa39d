"""Finds a micro-batch that fits the device: halves the planned size after each out-of-memory error.

As accelerate's `find_executable_batch_size`. The effective batch stays the same: the update starts again with more and
smaller micro-batches.
"""

import ctypes
import gc
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from app.domain.attempts import EncodedRow
from app.domain.memory import MAX_HOLES
from worker.training.batches import MicroBatch, collate

OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "out of memory", "could not create a primitive")
"""Parts of a CPU's out-of-memory errors, of torch's allocator and of oneDNN, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the CPU or the GPU has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in OUT_OF_MEMORY_MESSAGES)


def halve_max_tokens(batches: Sequence[MicroBatch]) -> int | None:
    """Half the tokens of the largest micro-batch that has more than one row. None if each has a single row."""
    sizes = [batch.tokens for batch in batches if len(batch.rows) > 1]
    return max(sizes) // 2 if sizes else None


def fits_in_memory(run: Callable[[], None]) -> bool:
    """Call `run`. Return False after an out-of-memory error, once the memory of `run` is freed."""
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # Outside of the handler: the error's traceback refers to the tensors until then.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def largest_batch(rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int) -> MicroBatch:
    """Build the micro-batch with the most memory within these limits: copies of the longest row."""
    longest = max(rows, key=lambda row: len(row.all_ids))
    count = max(1, min(max_tokens // len(longest.all_ids), max_rows or max_tokens))
    return collate([longest] * count)


def find_max_tokens(
    run: Callable[[MicroBatch], None], rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int
) -> int:
    """Find the size in tokens at which `run` has enough memory for the largest micro-batch.

    Tries `max_tokens` first, then half of it, and so on down to a single row.
    """
    while True:
        batch = largest_batch(rows, max_rows, max_tokens)
        if fits_in_memory(partial(run, batch)) or (half := halve_max_tokens([batch])) is None:
            return max_tokens
        max_tokens = half


def return_free_memory() -> None:
    """Return the heap's free pages to the system. Loading a base leaves up to 1 GB of them, a different amount in each
    run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


class Heap:
    """The heap between micro-batches. Its holes are returned to the system once they make it exceed the plan.

    What one micro-batch frees, the next one uses: to return that costs a page fault for each page, an eighth of an
    update's time. But tensors of ever new sizes leave holes that none of them fits into.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: resident bytes up to which nothing is returned."""
        self._limit = limit
        self._reused = 0  # resident bytes between two micro-batches without holes, the most so far
        self._is_trimmed = False

    def trim_if_grown(self) -> None:
        """Call it before each micro-batch. Returns the holes above the limit, once they have grown by `MAX_HOLES`."""
        resident = resident_bytes()
        if self._is_trimmed:
            self._reused, self._is_trimmed = max(self._reused, resident), False
        elif resident > max(self._limit, self._reused + MAX_HOLES):
            return_free_memory()
            self._is_trimmed = True


def resident_bytes() -> int:
    """Resident memory of this process in bytes. 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else 0


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes, mapped files included.

    `VmHWM` comes first: `ru_maxrss` of a child that was started by vfork may include the parent's memory.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
