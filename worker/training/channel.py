"""The line to the supervisor: down stdin the work order and then commands, up stdout events. It knows nothing of
training.

Nothing but events may reach the supervisor's pipe, so stdout is moved away before any library is imported, and
what they print goes to stderr. When stdin ends, the supervisor is dead and so is this process.
"""

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import BinaryIO

from app.domain.attempts import ChildCommand, ChildEvent, LogMessage
from worker.json_lines import MessageWriter, read_messages, take_stdin, take_stdout

SUPERVISOR_DEAD = 3
"""The exit status when stdin ended or stdout broke."""


class Channel:
    """An order and commands in, events out; commands wait here until the recipe asks for them."""

    def __init__(self, out: BinaryIO, commands: BinaryIO) -> None:
        self._writer = MessageWriter(out)
        self._in = commands
        self._order: SimpleQueue[bytes] = SimpleQueue()
        self._waiting: deque[ChildCommand] = deque()

    @classmethod
    def open(cls) -> "Channel":
        """The channel over this process's stdin and stdout; from now on a `print` goes to stderr."""
        channel = cls(take_stdout(), take_stdin())
        threading.Thread(target=channel._watch, name="commands", daemon=True).start()
        return channel

    def tell(self, event: ChildEvent) -> None:
        """Send one event as one line."""
        try:
            self._writer.send(event)
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
        read_messages(self._in, ChildCommand.model_validate_json, self._waiting.append, self._reject)
        os._exit(SUPERVISOR_DEAD)

    def _reject(self, line: bytes) -> None:
        self.tell(LogMessage(level="warning", message=f"unparseable command: {line[:200]!r}"))
