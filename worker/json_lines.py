"""JSON lines between a process and its child: one message a line, down the child's stdin and up its stdout."""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

T = TypeVar("T")


def encode_message(message: BaseModel) -> bytes:
    """A message as one line of JSON."""
    return message.model_dump_json(by_alias=True).encode() + b"\n"


def read_messages(
    lines: Iterable[bytes], parse: Callable[[bytes], T], take: Callable[[T], None], reject: Callable[[bytes], None]
) -> None:
    """Take every message until the lines end. `reject` gets the lines that `parse` raises ValidationError for."""
    for line in lines:
        try:
            message = parse(line)
        except ValidationError:
            reject(line)
        else:
            take(message)


class MessageWriter:
    """Writes one line per message. Any thread may send."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._lock = threading.Lock()

    def send(self, message: BaseModel) -> None:
        """Write and flush one message. Raises BrokenPipeError if the reader has gone."""
        line = encode_message(message)
        with self._lock:
            self._out.write(line)
            self._out.flush()


def take_stdin() -> BinaryIO:
    """This process's stdin. Unbuffered: Python cannot shut down while a thread waits inside a buffered stdin."""
    return os.fdopen(0, "rb", buffering=0, closefd=False)


def take_stdout() -> BinaryIO:
    """This process's stdout. From now on, what libraries print goes to stderr. Call it before importing them."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out
