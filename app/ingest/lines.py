"""Reads a file's lines in bounded memory. Also holds the types that every reader yields."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from app.domain.datasets import Finding, SourceRow, build_finding
from app.domain.strict_json import JOINED_FILES

BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16
"""Bytes at the start of a file by which its format and its line ends are recognised."""


@dataclass(frozen=True, slots=True)
class Header:
    """A file's column names, and which of them are read."""

    line: int
    names: tuple[str, ...]
    used: frozenset[str]


Item = SourceRow | Finding | Header
"""What a reader yields: a row, a finding for a row that cannot be read, or the column names."""


def numbered_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, the line with its newline); None for a line of more than `limit` bytes.

    `stream` must be seekable and at its start. A line may end in CR alone. A byte order mark at the start of any line
    is removed: joined files have one inside.
    """
    read_line = _line_reader(stream)
    number = 0
    while line := read_line(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            _skip_line(read_line)
            yield number, None
        else:
            yield number, line.removeprefix(BOM)


def with_newlines(head: bytes) -> bytes:
    """Converts CR to LF in the head of a file whose lines end in CR alone, as old Mac programs write them."""
    return head.replace(b"\r", b"\n") if _ends_lines_in_cr(head) else head


def _ends_lines_in_cr(head: bytes) -> bool:
    """Whether the first line does. Excel for Mac ends rows so, and writes LF for a line break within a cell."""
    line, end, rest = head.partition(b"\r")
    return bool(end) and b"\n" not in line and not rest.startswith(b"\n")


def _line_reader(stream: BinaryIO) -> Callable[[int], bytes]:
    """`readline` of the stream, or one that gives a newline for each CR where lines end in CR alone."""
    head = stream.read(HEAD)
    stream.seek(0)
    if not _ends_lines_in_cr(head):
        return stream.readline
    return _CarriageReturnLines(stream).readline


class _CarriageReturnLines:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._buffer = b""

    def readline(self, size: int) -> bytes:
        """The next line with its newline, at most `size` bytes of it; empty at the end of the stream."""
        while b"\n" not in self._buffer and len(self._buffer) < size and (chunk := self._stream.read(HEAD)):
            self._buffer += chunk.replace(b"\r", b"\n")
        end = min(size, self._buffer.find(b"\n") + 1 or size)
        line, self._buffer = self._buffer[:end], self._buffer[end:]
        return line


def _skip_line(read_line: Callable[[int], bytes]) -> None:
    while (rest := read_line(HEAD)) and not rest.endswith(b"\n"):
        pass


def joined_files(line: str) -> str | None:
    """The message for a broken line in which a second file begins; None for any other line."""
    return f"{JOINED_FILES}; put a line break there" if "\ufeff" in line else None


def too_long(line: int, limit: int) -> Finding:
    return build_finding(line, "line_too_long", f"the row has more than {limit:,} bytes; shorten or remove it")


def not_utf8(line: int) -> Finding:
    return build_finding(line, "bad_utf8", "the row is not UTF-8; save the file as UTF-8")
