"""`Processes` restarts with back-off, prefixes output lines, and leaves no process running at the end."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from app.cli.processes import FIRST_PAUSE, Processes, ProcessSpec
from tests.waiting import until

SLEEPER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print('here', flush=True)\ntime.sleep(60)",
]


@pytest.fixture
def lines() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def processes(lines: list[tuple[str, str]]) -> Iterator[Processes]:
    processes = Processes(lambda name, line: lines.append((name, line)))
    yield processes
    processes.stop()


def test_each_line_carries_the_name_of_its_process(processes: Processes, lines: list[tuple[str, str]]) -> None:
    processes.start(ProcessSpec("one", SLEEPER, {}))
    until(lambda: ("one", "here") in lines)


def test_a_killed_process_is_restarted_after_its_pause(processes: Processes, lines: list[tuple[str, str]]) -> None:
    processes.start(ProcessSpec("one", SLEEPER, {}))
    until(lambda: ("one", "here") in lines)
    first = processes.pid("one")
    killed_at = time.monotonic()
    os.kill(first, signal.SIGKILL)

    def restarted() -> bool:
        processes.restart_ended()
        return processes.running("one") and processes.pid("one") != first

    until(restarted)
    assert time.monotonic() - killed_at >= FIRST_PAUSE
    assert any("signal 9" in line and "starting again" in line for _name, line in lines)


def test_the_pause_doubles_while_a_process_keeps_ending(processes: Processes, lines: list[tuple[str, str]]) -> None:
    processes.start(ProcessSpec("one", [sys.executable, "-c", "raise SystemExit(3)"], {}))

    def ended(times: int) -> bool:
        processes.restart_ended()
        return sum("exit status 3" in line for _name, line in lines) >= times

    until(lambda: ended(3))
    pauses = [line.rsplit(" in ", 1)[1] for _name, line in lines if "exit status 3" in line]
    assert pauses[:3] == ["0.5 s", "1 s", "2 s"]


def test_stop_kills_a_process_that_ignores_sigterm_and_its_children(lines: list[tuple[str, str]]) -> None:
    processes = Processes(lambda name, line: lines.append((name, line)))
    processes.start(ProcessSpec("one", STUBBORN, {}, grace=0.5))
    until(lambda: ("one", "here") in lines)
    leader = psutil.Process(processes.pid("one"))
    family = [leader, *leader.children(recursive=True)]
    assert len(family) == 2
    processes.stop()
    _ended, left = psutil.wait_procs(family, timeout=5)
    assert left == []
