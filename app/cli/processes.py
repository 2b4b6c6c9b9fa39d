"""Keeps a set of processes running: starts them, restarts them with back-off, prefixes their output, stops them."""

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
"""The back-off starts again from `FIRST_PAUSE` for a process that ran longer than this."""

PrintLine = Callable[[str, str], None]
"""(name of the process, line)"""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to keep running. `grace`: seconds between SIGTERM and SIGKILL."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    grace: float = 10.0


@dataclass(slots=True)
class _ManagedProcess:
    spec: ProcessSpec
    process: "subprocess.Popen[bytes]"
    started: float
    pause: float = FIRST_PAUSE
    restart_at: float | None = None
    readers: list[threading.Thread] = field(default_factory=list)


class Processes:
    """Use it from one thread. Each process leads a process group, and signals go to the whole group."""

    def __init__(self, print_line: PrintLine) -> None:
        self._print_line = print_line
        self._managed: list[_ManagedProcess] = []

    def start(self, spec: ProcessSpec) -> None:
        self._managed.append(self._spawn(spec))

    def pid(self, name: str) -> int:
        """The process id of the process with this name. Raises StopIteration if none was started with it."""
        return next(managed.process.pid for managed in self._managed if managed.spec.name == name)

    def running(self, name: str) -> bool:
        return any(managed.spec.name == name and managed.process.poll() is None for managed in self._managed)

    def restart_ended(self) -> None:
        """Restart each ended process once its back-off is over."""
        now = time.monotonic()
        for index, managed in enumerate(self._managed):
            if managed.process.poll() is None:
                continue
            if managed.restart_at is None:
                self._schedule_restart(managed, now)
            elif now >= managed.restart_at:
                fresh = self._spawn(managed.spec)
                fresh.pause = min(managed.pause * 2, LONGEST_PAUSE)
                self._managed[index] = fresh

    def stop(self) -> None:
        """Send SIGTERM to all but the first, then to the first, which the others need. After `grace`, send SIGKILL."""
        for group in (self._managed[1:], self._managed[:1]):
            for managed in group:
                _signal(managed.process, signal.SIGTERM)
            until = time.monotonic()
            for managed in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    managed.process.wait(max(0.1, until + managed.spec.grace - time.monotonic()))
                _signal(managed.process, signal.SIGKILL)
                managed.process.wait()
                for reader in managed.readers:
                    reader.join(1.0)

    def _schedule_restart(self, managed: _ManagedProcess, now: float) -> None:
        _signal(managed.process, signal.SIGKILL)  # ends the rest of its process group
        if now - managed.started > STEADY_SECONDS:
            managed.pause = FIRST_PAUSE
        managed.restart_at = now + managed.pause
        status = managed.process.returncode
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._print_line(managed.spec.name, f"ended ({ending}); starting again in {managed.pause:g} s")

    def _spawn(self, spec: ProcessSpec) -> _ManagedProcess:
        process = subprocess.Popen(
            [*_die_with_parent(), *spec.command],
            env=os.environ | spec.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        managed = _ManagedProcess(spec, process, time.monotonic())
        assert process.stdout is not None
        reader = threading.Thread(target=self._forward, args=(spec.name, process.stdout), daemon=True)
        reader.start()
        managed.readers.append(reader)
        return managed

    def _forward(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._print_line(name, line.decode(errors="replace").rstrip("\n"))


def _die_with_parent() -> list[str]:
    """A command prefix, where the system has setpriv: the child gets SIGTERM when this process is killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
