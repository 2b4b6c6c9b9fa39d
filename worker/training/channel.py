"""The line to the supervisor: down stdin the work order and then commands, up stdout events. It knows nothing of
training.

Nothing but events may reach the supervisor's pipe, so stdout is moved away before any library is imported, and
what they print goes to stderr. When stdin ends, the supervisor is dead and so is this process.
"""

import os
import sys
import threading
from collections import deque
from queue import SimpleQueue
from typing import BinaryIO

from pydantic import ValidationError

from app.domain.attempts import ChildCommand, ChildEvent, LogMessage

SUPERVISOR_DEAD = 3
"""The exit status when stdin ended or stdout broke."""


class Channel:
    """An order and commands in, events out; commands wait here until the recipe asks for them."""

    def __init__(self, out: BinaryIO, commands: BinaryIO) -> None:
        self._out = out
        self._in = commands
        self._lock = threading.Lock()
        self._order: SimpleQueue[bytes] = SimpleQueue()
        self._waiting: deque[ChildCommand] = deque()

    @classmethod
    def open(cls) -> "Channel":
        """The channel over this process's stdin and stdout; from now on a `print` goes to stderr."""
        sys.stdout.flush()
        out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        # Unbuffered: Python cannot shut down while a thread waits inside a buffered stdin.
        channel = cls(out, os.fdopen(0, "rb", buffering=0, closefd=False))
        threading.Thread(target=channel._watch, name="commands", daemon=True).start()
        return channel

    def tell(self, event: ChildEvent) -> None:
        """Send one event as one line."""
        line = event.model_dump_json().encode() + b"\n"
        try:
            with self._lock:
                self._out.write(line)
                self._out.flush()
        except BrokenPipeError:
            os._exit(SUPERVISOR_DEAD)

    def order(self) -> bytes:
        """The first line, as soon as it is there: this process may have been started before there was any work."""
        return self._order.get()

    def next_command(self) -> ChildCommand | None:
        """The oldest command not yet asked for, or None."""
        return self._waiting.popleft() if self._waiting else None

    def has_command(self) -> bool:
        """Whether a command waits to be asked for."""
        return bool(self._waiting)

    def must_leave(self) -> bool:
        """Whether a `pause` or `stop` waits to be asked for."""
        return any(command.command != "checkpoint" for command in self._waiting.copy())

    def must_stop(self) -> bool:
        """Whether a `stop` waits to be asked for."""
        return any(command.command == "stop" for command in self._waiting.copy())

    def _watch(self) -> None:
        if order := self._in.readline():
            self._order.put(order)
        for line in self._in:
            try:
                self._waiting.append(ChildCommand.model_validate_json(line))
            except ValidationError:
                self.tell(LogMessage(level="warning", message=f"a command was not understood: {line[:200]!r}"))
        os._exit(SUPERVISOR_DEAD)
