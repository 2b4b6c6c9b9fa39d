"""Keeping processes running: restart with back-off, prefixed lines, and no process left running at the end."""

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
def said() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def processes(said: list[tuple[str, str]]) -> Iterator[Processes]:
    kept = Processes(lambda who, line: said.append((who, line)))
    yield kept
    kept.stop()


def test_lines_carry_the_name_of_who_said_them(processes: Processes, said: list[tuple[str, str]]) -> None:
    processes.start(ProcessSpec("one", SLEEPER, {}))
    until(lambda: ("one", "here") in said)


def test_a_killed_process_comes_back_after_its_pause(processes: Processes, said: list[tuple[str, str]]) -> None:
    processes.start(ProcessSpec("one", SLEEPER, {}))
    until(lambda: ("one", "here") in said)
    first = processes.pid("one")
    killed_at = time.monotonic()
    os.kill(first, signal.SIGKILL)

    def tended() -> bool:
        processes.restart_ended()
        return processes.running("one") and processes.pid("one") != first

    until(tended)
    assert time.monotonic() - killed_at >= FIRST_PAUSE
    assert any("signal 9" in line and "starting again" in line for _who, line in said)


def test_a_process_that_keeps_ending_is_restarted_ever_more_slowly(
    processes: Processes, said: list[tuple[str, str]]
) -> None:
    processes.start(ProcessSpec("one", [sys.executable, "-c", "raise SystemExit(3)"], {}))

    def ended(times: int) -> bool:
        processes.restart_ended()
        return sum("exit status 3" in line for _who, line in said) >= times

    until(lambda: ended(3))
    pauses = [line.rsplit(" in ", 1)[1] for _who, line in said if "exit status 3" in line]
    assert pauses[:3] == ["0.5 s", "1 s", "2 s"]


def test_stop_ends_a_stubborn_process_and_its_children(said: list[tuple[str, str]]) -> None:
    kept = Processes(lambda who, line: said.append((who, line)))
    kept.start(ProcessSpec("one", STUBBORN, {}, grace=0.5))
    until(lambda: ("one", "here") in said)
    leader = psutil.Process(kept.pid("one"))
    family = [leader, *leader.children(recursive=True)]
    assert len(family) == 2
    kept.stop()
    _gone, left = psutil.wait_procs(family, timeout=5)
    assert left == []
