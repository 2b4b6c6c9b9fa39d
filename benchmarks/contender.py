"""One run of one contender: a process that tells JSON lines, when each of them came, and its memory meanwhile."""

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
    """What was told, at how many seconds after the start, and the resident bytes then."""

    at: float
    told: dict[str, Any]
    resident: int


@dataclass(slots=True)
class Run:
    """A finished run. `peaks`: the most resident bytes from each line to the next one."""

    lines: list[Line] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def first(self, key: str, value: object) -> int:
        """The place of the first line whose `key` has this value."""
        for place, line in enumerate(self.lines):
            if line.told.get(key) == value:
                return place
        raise BenchmarkError(f"a contender never told {key}: {value}")

    def memory(self, imported: int, loaded: int) -> dict[str, float]:
        """MiB after the imports, after loading, at the peak, and how far the peak is above the imports."""
        before, peak = self.lines[imported].resident, max(self.peaks[imported:])
        return {
            "after_imports_mib": round(before / MIB, 1),
            "loaded_mib": round(self.lines[loaded].resident / MIB, 1),
            "peak_mib": round(peak / MIB, 1),
            "peak_while_training_mib": round(max(self.peaks[loaded:]) / MIB, 1),
            "peak_growth_mib": round((peak - before) / MIB, 1),
        }


def environment(own: dict[str, str], threads: int) -> dict[str, str]:
    """The processor only, and the same number of threads for everybody."""
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own, **fixed, "VERITUNE_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def run(command: list[str], env: dict[str, str], given: str = "") -> Run:
    """The process to its end, with `given` as its input. Raises BenchmarkError, with its stderr, when it fails."""
    done, began = Run(), time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        # A pipe as stdin that stays open: the training child takes its end for the death of its supervisor.
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
                continue  # what libraries print
            resident = _resident(watched)
            done.lines.append(Line(round(time.perf_counter() - began, 3), json.loads(raw), resident))
            done.peaks.append(peak[0])
            peak[0] = resident
        process.wait()
    finally:
        over.set()
        sampler.join()
    done.peaks = [*done.peaks[1:], peak[0]]  # the first is what came before any line


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def adapter_digest(adapter: Path) -> str:
    """What tells one trained adapter from another: a digest of its weights' file."""
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
