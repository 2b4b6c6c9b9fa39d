"""This host's device, described without loading a GPU library."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from app.domain.devices import DeviceDescription
from worker.cgroup import memory_limit
from worker.processor import cpu_here

WORKER_ITSELF = 256 << 20
"""Memory of the worker process itself, in bytes. Its child shares the same limit."""


def describe_device(queues: tuple[str, ...]) -> DeviceDescription:
    """The first GPU that nvidia-smi lists, else the CPU."""
    cores = len(os.sched_getaffinity(0))
    if (found := _first_gpu()) is not None:
        name, mebibytes, capability = found
        major, minor = capability.split(".")
        return DeviceDescription(
            type="gpu",
            model=name,
            bytes=int(mebibytes) << 20,
            capability=(int(major), int(minor)),
            cores=cores,
            queues=queues,
        )
    return DeviceDescription(
        type="cpu",
        model=_cpu_model(),
        bytes=host_memory(),
        bfloat16=cpu_here().fast_bf16,
        cores=cores,
        queues=queues,
    )


def host_memory() -> int:
    """Bytes of host memory that a child may use: the machine's, or its container's limit less the worker's own."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return physical if limit is None or limit >= physical else max(0, limit - WORKER_ITSELF)


def _first_gpu() -> tuple[str, str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    parts = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
    return (parts[0], parts[1], parts[2]) if done.returncode == 0 and len(parts) == 3 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
