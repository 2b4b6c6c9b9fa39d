"""A child process that owns the tensors: in a process group of its own, over JSON lines, and surely killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from queue import SimpleQueue
from typing import IO

import structlog
from pydantic import BaseModel

from app.domain.attempts import CHILD_EVENT, ChildCommand, ChildEvent, TrainOrder
from worker.environment import for_tensors
from worker.json_lines import MessageWriter, read_messages

GRACE = 3.0
"""Seconds between asking a child to stop and killing its group."""

SPARE_BYTES = 512 << 20
"""The most memory that a child uses while it waits for work."""

log = structlog.get_logger(__name__)


class Child:
    """`python -m MODULE`. It reads a work order and then commands from stdin, and writes events to stdout.

    However this process ends, the child's stdin closes, and the child ends then.
    """

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=for_tensors(),
        )
        self._events: SimpleQueue[ChildEvent | None] = SimpleQueue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def begin(self, order: TrainOrder) -> None:
        """Send the work order. Once per child, before any command."""
        self._send(order)

    def _read(self, stream: IO[bytes]) -> None:
        read_messages(stream, CHILD_EVENT.validate_json, self._events.put, self._reject)
        self._events.put(None)

    def _reject(self, line: bytes) -> None:
        log.warning("child_message_unparseable", line=line[:200].decode(errors="replace"))

    def next(self, timeout: float) -> ChildEvent | None:
        """The next event; None at the end. Raises queue.Empty after `timeout` seconds."""
        return self._events.get(timeout=timeout)

    def send(self, command: ChildCommand) -> None:
        """Send a command. If the child has ended, this does nothing."""
        self._send(command)

    def _send(self, message: BaseModel) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: it was killed, and the pipe is closed
            MessageWriter(self._process.stdin).send(message)

    def wait(self) -> int:
        """Exit status, negative for a signal. Call it once `next` has returned None."""
        try:
            return self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL the whole group, grandchildren included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._reader.join(GRACE)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close() if stream else None
        return status


class Spares:
    """Children that were started before there is work, because their imports take seconds and half a gigabyte.

    At most one per module. For one thread at a time.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Child] = {}

    def keep(self, module: str) -> None:
        """Start one, unless one waits."""
        waiting = self._waiting.get(module)
        if waiting is None or not waiting.running:
            self._end(module)
            self._waiting[module] = Child(module)

    def take(self, module: str) -> Child:
        """The waiting one, or a new one."""
        waiting = self._waiting.get(module)
        if waiting is not None and waiting.running:
            return self._waiting.pop(module)
        self._end(module)
        return Child(module)

    def dismiss(self) -> None:
        for module in list(self._waiting):
            self._end(module)

    def _end(self, module: str) -> None:
        if (child := self._waiting.pop(module, None)) is not None:
            child.kill()
