"""A child process that owns the tensors: started in its own group, spoken to by lines, ended for certain."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from queue import SimpleQueue
from typing import IO

import structlog
from pydantic import ValidationError

from app.domain.attempts import CHILD_EVENT, ChildCommand, ChildEvent
from worker.environment import for_tensors

GRACE = 3.0
"""Seconds between asking a child to stop and killing its group."""

SPARE_BYTES = 512 << 20
"""What a child takes of its host while it waits for work, at most."""

log = structlog.get_logger(__name__)


class Child:
    """`python -m MODULE`: an order and then commands down its stdin, events up its stdout, stderr to ours.

    Its stdin closes with this process, however that ends, and the child leaves when it does.
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

    def begin(self, order: str) -> None:
        """Hand it its work, one line of JSON. Once in its life, before any command."""
        self._write(order)

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            try:
                self._events.put(CHILD_EVENT.validate_json(line))
            except ValidationError:
                log.warning("child_said_nonsense", line=line[:200].decode(errors="replace"))
        self._events.put(None)

    def next(self, timeout: float) -> ChildEvent | None:
        """The next event. Raises queue.Empty after `timeout` seconds; None when there will be no more."""
        return self._events.get(timeout=timeout)

    def tell(self, command: ChildCommand) -> None:
        """Send a command. A child that is gone hears nothing, which its end will tell."""
        self._write(command.model_dump_json())

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def wait(self) -> int:
        """Exit status, negative for a signal; call when `next` gave None."""
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
    """Children that have been started before there is work for them: importing takes them seconds, and half a gigabyte.

    One for each module, for one thread at a time.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Child] = {}

    def keep(self, module: str) -> None:
        """Have one wait, unless one does."""
        waiting = self._waiting.get(module)
        if waiting is None or not waiting.running:
            self._end(module)
            self._waiting[module] = Child(module)

    def take(self, module: str) -> Child:
        """The one that waits, or a new one."""
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
