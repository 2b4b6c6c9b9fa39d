"""Runs one contender: a process that prints JSON lines. Records when each line came, and the process's memory."""

import hashlib
import json
import os
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.deployment import BenchmarkError
from benchmarks.machine import MIB, ROOT

SAMPLE_SECONDS = 0.02
TAIL = 3_000


@dataclass(frozen=True, slots=True)
class Line:
    """One JSON line, the seconds since the start, and the resident bytes at that moment."""

    at: float
    told: dict[str, Any]
    resident: int


@dataclass(slots=True)
class Run:
    """A finished run. `peaks`: the peak of resident bytes between each line and the next."""

    lines: list[Line] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def first(self, key: str, value: object) -> int:
        """The index of the first line whose `key` has this value."""
        for index, line in enumerate(self.lines):
            if line.told.get(key) == value:
                return index
        raise BenchmarkError(f"a contender never printed {key}: {value}")

    def memory(self, imported: int, loaded: int) -> dict[str, float]:
        """MiB after the imports, after loading, and at the peak; and the peak minus the imports."""
        before, peak = self.lines[imported].resident, max(self.peaks[imported:])
        return {
            "after_imports_mib": round(before / MIB, 1),
            "loaded_mib": round(self.lines[loaded].resident / MIB, 1),
            "peak_mib": round(peak / MIB, 1),
            "peak_while_training_mib": round(max(self.peaks[loaded:]) / MIB, 1),
            "peak_growth_mib": round((peak - before) / MIB, 1),
        }


def environment(own: dict[str, str], threads: int) -> dict[str, str]:
    """Environment variables: CPU only, and the same number of threads for every contender."""
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own, **fixed, "VERITUNE_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def run(command: list[str], env: dict[str, str], given: str = "") -> Run:
    """Run the process to its end with `given` as its stdin. Raises BenchmarkError with its stderr if it fails."""
    done, began = Run(), time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        # Keep the stdin pipe open: the training child exits at its end, because its supervisor has died then.
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            assert process.stdin is not None
            process.stdin.write(given.encode())
            process.stdin.flush()
            _listen(process, done, began)
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
        if code:
            errors.seek(0)
            raise BenchmarkError(f"{command} ended with {code}:\n{errors.read().decode(errors='replace')[-TAIL:]}")
    done.seconds = round(time.perf_counter() - began, 2)
    return done


def _listen(process: "subprocess.Popen[bytes]", done: Run, began: float) -> None:
    watched, over = psutil.Process(process.pid), threading.Event()
    peak = [0]

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error):
                peak[0] = max(peak[0], watched.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stdout is not None
    try:
        for raw in process.stdout:
            if not raw.startswith(b'{"'):
                continue  # output of libraries
            resident = _resident(watched)
            done.lines.append(Line(round(time.perf_counter() - began, 3), json.loads(raw), resident))
            done.peaks.append(peak[0])
            peak[0] = resident
        process.wait()
    finally:
        over.set()
        sampler.join()
    done.peaks = [*done.peaks[1:], peak[0]]  # the first peak is the one before any line


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def adapter_digest(adapter: Path) -> str:
    """A digest of an adapter's weights file."""
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
