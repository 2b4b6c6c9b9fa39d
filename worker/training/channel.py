"""Exchanges JSON lines with the supervisor: stdin brings the work order, then commands; stdout carries events.

Only events may reach the supervisor's pipe. So `Channel.open` redirects stdout to stderr before any library is
imported that could print. When stdin ends, the supervisor is dead, and this process exits.
"""

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import BinaryIO

from app.domain.attempts import ChildCommand, ChildEvent, LogMessage
from worker.json_lines import MessageWriter, read_messages, take_stdin, take_stdout

SUPERVISOR_DEAD = 3
"""Exit status of a child whose stdin ended or whose stdout broke."""


class Channel:
    """Sends events, and queues the order and the commands until the recipe takes them."""

    def __init__(self, out: BinaryIO, commands: BinaryIO) -> None:
        self._writer = MessageWriter(out)
        self._in = commands
        self._order: SimpleQueue[bytes] = SimpleQueue()
        self._commands: deque[ChildCommand] = deque()

    @classmethod
    def open(cls) -> "Channel":
        """Open the channel over this process's stdin and stdout. From then on `print` writes to stderr."""
        channel = cls(take_stdout(), take_stdin())
        threading.Thread(target=channel._watch, name="commands", daemon=True).start()
        return channel

    def send(self, event: ChildEvent) -> None:
        """Send `event` as one line. Exits the process if the supervisor is dead."""
        try:
            self._writer.send(event)
        except BrokenPipeError:
            os._exit(SUPERVISOR_DEAD)

    def receive_order(self) -> bytes:
        """Wait for the first line, the work order. A child may be started before a job needs it."""
        return self._order.get()

    def next_command(self) -> ChildCommand | None:
        """Take the oldest queued command. None if there is none."""
        return self._commands.popleft() if self._commands else None

    def has_command(self) -> bool:
        """Whether a command is queued."""
        return bool(self._commands)

    def must_exit(self) -> bool:
        """Whether a `pause` or `stop` is queued."""
        return any(command.command != "checkpoint" for command in self._commands.copy())

    def must_stop(self) -> bool:
        """Whether a `stop` is queued."""
        return any(command.command == "stop" for command in self._commands.copy())

    def _watch(self) -> None:
        if order := self._in.readline():
            self._order.put(order)
        read_messages(self._in, ChildCommand.model_validate_json, self._commands.append, self._reject)
        os._exit(SUPERVISOR_DEAD)

    def _reject(self, line: bytes) -> None:
        self.send(LogMessage(level="warning", message=f"unparseable command: {line[:200]!r}"))
