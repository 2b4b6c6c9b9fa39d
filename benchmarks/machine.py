"""Describes the machine, its load and the versions, and samples memory while work runs."""

import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
PACKAGES = (
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "sqlalchemy",
    "celery",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
)


def head(what: str, module: str) -> dict[str, Any]:
    """The head of every result: command, commit, machine and versions."""
    return {
        "what": what,
        "command": shlex.join(["python", "-m", module, *map(_without_its_place, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code_revision": revision(),
        "machine": machine(),
    }


def _without_its_place(word: str) -> str:
    """An argument without the path that a directory has on this machine alone."""
    return Path(word).name if Path(word).is_absolute() else word


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def revision() -> str | None:
    """The commit, with `+changes` when the tree differs from it; None without a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--", "app", "worker", "migrations") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def busy() -> dict[str, float]:
    """The machine's load by other work, measured for one second while no benchmark runs."""
    return {"processor_percent": psutil.cpu_percent(interval=1.0), "load_average": round(os.getloadavg()[0], 2)}


def timed_python(code: str) -> float:
    """Seconds that a new Python process takes to run `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    return time.perf_counter() - began


class Memory:
    """The resident memory of a process, and the lives of those of its children that `word` names."""

    def __init__(self, pid: int, word: str) -> None:
        self._process = psutil.Process(pid)
        self._word = word
        self.before = self.peak = self._process.memory_info().rss
        self.child_peak = 0
        self.child_began: float | None = None
        self.child_ended: float | None = None
        self._child: psutil.Process | None = None

    def look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)
        if self._child is None:
            self._child = next((p for p in self._process.children() if self._word in p.cmdline()), None)
            self.child_began = time.time() if self._child else None
        elif self.child_ended is None:
            self._look_at(self._child)

    def _look_at(self, child: psutil.Process) -> None:
        try:
            self.child_peak = max(self.child_peak, child.memory_info().rss)
            if child.status() == psutil.STATUS_ZOMBIE:
                self.child_ended = time.time()
        except psutil.NoSuchProcess:
            self.child_ended = time.time()


@contextmanager
def watched(pid: int, word: str, period: float = 0.02) -> Iterator[Memory]:
    """Sample memory while the block runs."""
    memory, over = Memory(pid, word), threading.Event()

    def sample() -> None:
        while not over.wait(period):
            with suppress(psutil.NoSuchProcess):
                memory.look()

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()
