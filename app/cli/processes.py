"""A set of processes that is kept running: started, restarted with back-off, stopped. Each line carries its name."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 30.0
"""A process that ran this long and then ended is restarted at once: its back-off begins anew."""

Say = Callable[[str, str], None]
"""(name of the process, line)"""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to be kept. `grace`: seconds it gets between SIGTERM and SIGKILL."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    grace: float = 10.0


@dataclass(slots=True)
class _KeptProcess:
    spec: ProcessSpec
    process: "subprocess.Popen[bytes]"
    started: float
    pause: float = FIRST_PAUSE
    restart_at: float | None = None
    readers: list[threading.Thread] = field(default_factory=list)


class Processes:
    """Used from one thread. Each part leads a process group of its own, which goes as a whole."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._kept: list[_KeptProcess] = []

    def start(self, spec: ProcessSpec) -> None:
        self._kept.append(self._spawn(spec))

    def pid(self, name: str) -> int:
        """The id of the running process with this name. Raises StopIteration for a name that was never started."""
        return next(kept.process.pid for kept in self._kept if kept.spec.name == name)

    def running(self, name: str) -> bool:
        return any(kept.spec.name == name and kept.process.poll() is None for kept in self._kept)

    def restart_ended(self) -> None:
        """Restart what has ended, once its back-off is over."""
        now = time.monotonic()
        for place, kept in enumerate(self._kept):
            if kept.process.poll() is None:
                continue
            if kept.restart_at is None:
                self._schedule_restart(kept, now)
            elif now >= kept.restart_at:
                fresh = self._spawn(kept.spec)
                fresh.pause = min(kept.pause * 2, LONGEST_PAUSE)
                self._kept[place] = fresh

    def stop(self) -> None:
        """SIGTERM to all but the first (which the others need), then to it; SIGKILL what still runs."""
        for group in (self._kept[1:], self._kept[:1]):
            for kept in group:
                _signal(kept.process, signal.SIGTERM)
            until = time.monotonic()
            for kept in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    kept.process.wait(max(0.1, until + kept.spec.grace - time.monotonic()))
                _signal(kept.process, signal.SIGKILL)
                kept.process.wait()
                for reader in kept.readers:
                    reader.join(1.0)

    def _schedule_restart(self, kept: _KeptProcess, now: float) -> None:
        _signal(kept.process, signal.SIGKILL)  # what is left of its process group
        if now - kept.started > STEADY_SECONDS:
            kept.pause = FIRST_PAUSE
        kept.restart_at = now + kept.pause
        status = kept.process.returncode
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._say(kept.spec.name, f"ended ({ending}); starting again in {kept.pause:g} s")

    def _spawn(self, spec: ProcessSpec) -> _KeptProcess:
        process = subprocess.Popen(
            [*_die_with_parent(), *spec.command],
            env=os.environ | spec.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        kept = _KeptProcess(spec, process, time.monotonic())
        assert process.stdout is not None
        reader = threading.Thread(target=self._forward, args=(spec.name, process.stdout), daemon=True)
        reader.start()
        kept.readers.append(reader)
        return kept

    def _forward(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._say(name, line.decode(errors="replace").rstrip("\n"))


def _die_with_parent() -> list[str]:
    """Where the system has it, a child gets SIGTERM when this process is killed outright."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
