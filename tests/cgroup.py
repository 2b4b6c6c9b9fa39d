"""A real memory limit for processes of a test, by a control group of their own."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

MOUNT = Path("/sys/fs/cgroup")
FILES = {MOUNT / "memory": "memory.limit_in_bytes", MOUNT: "memory.max"}
"""Where either version of the kernel's interface has its groups, and how it calls the limit."""


@dataclass(frozen=True)
class Group:
    directory: Path

    def take(self, process: psutil.Process) -> None:
        """Move a process in, with what it has started and will start."""
        for member in (process, *process.children(recursive=True)):
            (self.directory / "cgroup.procs").write_text(str(member.pid))


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Group]:
    """A group of at most `limit` bytes, gone afterwards with whatever still runs in it. Skips the test where the
    system lets nobody make one."""
    for mount, limit_file in FILES.items():
        directory = mount / f"veritune-{os.getpid()}"
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            if (directory / limit_file).exists():  # the kernel's, where it limits memory here
                (directory / limit_file).write_text(str(limit))
                yield Group(directory)
                return
        finally:
            _remove(directory)
    pytest.skip("no control group can be made here: that takes root")


def _remove(directory: Path) -> None:
    listed = directory / "cgroup.procs"
    left = [psutil.Process(int(pid)) for pid in (listed.read_text().split() if listed.exists() else ())]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    directory.rmdir()
