"""What a process that owns tensors is started with; the operator's own settings go before it."""

import os

from app.domain.memory import MMAP_FROM

TENSORS = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin for ever while they wait starve the process beside them; threads that sleep at once take 50 µs
    # to wake for a 10 µs kernel. So they spin for about as long as waking takes.
    "GOMP_SPINCOUNT": "10000",
    # Activations of a megabyte come and go thousands of times an update. Handed back to the system each time, they are
    # paid for in page faults: element-wise kernels were seen to take twenty times as long. Larger blocks, such as
    # logits over a vocabulary, do go back: in the heap they leave holes: 2.1 GB of heap with 0.4 GB in use.
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_FROM),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    # In pages of 2 MB, where the system gives them to those who ask: a fiftieth of the faults.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Kernels compiled for one shape take 300 to 400 kB each, with AMX 900 kB, and rows come in ever new lengths: oneDNN
    # would keep 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}


def for_tensors() -> dict[str, str]:
    """The environment of a training child or an engine."""
    return TENSORS | os.environ
