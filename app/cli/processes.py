"""Keeping a set of processes alive: start, prefix their lines, restart with back-off, stop every one of them."""

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
"""(who, line)"""


@dataclass(frozen=True, slots=True)
class Part:
    """A process to be kept. `grace`: seconds it gets between SIGTERM and SIGKILL."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    grace: float = 10.0


@dataclass(slots=True)
class _Kept:
    part: Part
    process: "subprocess.Popen[bytes]"
    started: float
    pause: float = FIRST_PAUSE
    restart_at: float | None = None
    readers: list[threading.Thread] = field(default_factory=list)


class Processes:
    """Used from one thread. Each part leads a process group of its own, which goes as a whole."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._kept: list[_Kept] = []

    def start(self, part: Part) -> None:
        self._kept.append(self._spawn(part))

    def pid(self, name: str) -> int:
        """The present process of a part. Raises StopIteration for a name that was never started."""
        return next(kept.process.pid for kept in self._kept if kept.part.name == name)

    def running(self, name: str) -> bool:
        return any(kept.part.name == name and kept.process.poll() is None for kept in self._kept)

    def tend(self) -> None:
        """Restart what has ended, once its back-off is over."""
        now = time.monotonic()
        for place, kept in enumerate(self._kept):
            if kept.process.poll() is None:
                continue
            if kept.restart_at is None:
                self._note_end(kept, now)
            elif now >= kept.restart_at:
                fresh = self._spawn(kept.part)
                fresh.pause = min(kept.pause * 2, LONGEST_PAUSE)
                self._kept[place] = fresh

    def stop(self) -> None:
        """SIGTERM to all but the first (which the others need), then to it; SIGKILL whoever stays."""
        for group in (self._kept[1:], self._kept[:1]):
            for kept in group:
                _signal(kept.process, signal.SIGTERM)
            until = time.monotonic()
            for kept in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    kept.process.wait(max(0.1, until + kept.part.grace - time.monotonic()))
                _signal(kept.process, signal.SIGKILL)
                kept.process.wait()
                for reader in kept.readers:
                    reader.join(1.0)

    def _note_end(self, kept: _Kept, now: float) -> None:
        _signal(kept.process, signal.SIGKILL)  # whatever it left behind in its group
        if now - kept.started > STEADY_SECONDS:
            kept.pause = FIRST_PAUSE
        kept.restart_at = now + kept.pause
        status = kept.process.returncode
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._say(kept.part.name, f"ended ({ending}); starting again in {kept.pause:g} s")

    def _spawn(self, part: Part) -> _Kept:
        process = subprocess.Popen(
            [*_dies_with_us(), *part.command],
            env=os.environ | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        kept = _Kept(part, process, time.monotonic())
        assert process.stdout is not None
        reader = threading.Thread(target=self._forward, args=(part.name, process.stdout), daemon=True)
        reader.start()
        kept.readers.append(reader)
        return kept

    def _forward(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._say(name, line.decode(errors="replace").rstrip("\n"))


def _dies_with_us() -> list[str]:
    """Where the system has it, a child gets SIGTERM when this process is killed outright."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
