"""A file's lines in bounded memory, and what every reader hands on. Knows nothing of what a line means."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from app.domain.datasets import Finding, SourceRow, finding

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Header:
    """The column names that stand in a file once, and those of them that are read."""

    line: int
    names: tuple[str, ...]
    used: frozenset[str]


Item = SourceRow | Finding | Header
"""What a reader yields: a row, a row that is refused before it is one, or the names of the columns."""


def numbered_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, the line with its newline); None for a line of more than `limit` bytes."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            _skip_line(stream)
            yield number, None
        else:
            yield number, line.removeprefix(BOM) if number == 1 else line


def _skip_line(stream: BinaryIO) -> None:
    while (rest := stream.readline(1 << 16)) and not rest.endswith(b"\n"):
        pass


def too_long(line: int, limit: int) -> Finding:
    return finding(line, "line_too_long", f"the row has more than {limit:,} bytes; shorten it or leave it out")


def not_utf8(line: int) -> Finding:
    return finding(line, "bad_utf8", "the row is not UTF-8; save the file as UTF-8")
