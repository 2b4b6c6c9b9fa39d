"""Starts and kills the engine's process."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import worker
from worker.environment import for_tensors
from worker.inference.ipc import MAX_LINE


async def start_engine() -> Process:
    """Start an engine in a process group of its own. Raises OSError."""
    environment = {
        **for_tensors(),
        "PYTHONPATH": os.pathsep.join([_import_root(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.inference.engine",
        stdin=PIPE,
        stdout=PIPE,
        limit=MAX_LINE,
        env=environment,
        start_new_session=True,
    )


def _import_root() -> str:
    """The directory that `worker` is imported from, so that the engine imports the same one."""
    return str(Path(worker.__path__[0]).resolve().parent)


def kill_group(pid: int) -> None:
    """Kill a process and its children. It may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
