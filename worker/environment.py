"""Environment variables of a process that owns tensors. The operator's own values take precedence."""

import os

from app.domain.memory import MMAP_FROM

TENSORS = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP threads that always spin starve other processes. Threads that sleep at once take 50 µs to wake for a
    # 10 µs kernel. So they spin for about as long as waking takes.
    "GOMP_SPINCOUNT": "10000",
    # An update allocates and frees activations of a megabyte thousands of times. If malloc returns each to the system,
    # page faults slow element-wise kernels down twenty times, as measured. Larger blocks, such as logits over a
    # vocabulary, are returned: they fragment the heap, which had 2.1 GB with 0.4 GB in use.
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_FROM),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    # Huge pages (2 MB), if the system allows them by request: a fiftieth of the page faults.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # oneDNN compiles a kernel per shape: 300 to 400 kB each, and with AMX about 900 kB, as inferred from the heap's
    # growth. Rows differ in length, so there are many shapes, and oneDNN would keep 1,024 of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}


def for_tensors() -> dict[str, str]:
    """The environment of a training child or an engine."""
    return TENSORS | os.environ
