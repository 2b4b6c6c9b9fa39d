"""A JSON document: an array of rows, an object that holds one array of rows, rows keyed by index, or one row alone.

The reader finds where each item starts and ends without parsing it. Memory is bounded by one item, nesting depth costs
nothing, and one broken item is one refused row. A streaming JSON parser gives no line numbers and stops at an invalid
byte.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from app.domain.datasets import SourceRow
from app.domain.errors import InvalidError
from app.ingest.json_lines import json_row
from app.ingest.lines import BOM, HEAD, Item, too_long

_CHUNK = 1 << 18
_PLAIN = re.compile(rb'[^"{}\[\],]*+')
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_KEY = rb'"((?:[^"\\]|\\.)*+)"\s*+:\s*+'
_LEADING_KEY = re.compile(rb"\s*+" + _KEY, re.DOTALL)
_FIRST_OBJECT = re.compile(rb"\s*+\{\s*+" + _KEY + rb"\{\s*+" + _KEY, re.DOTALL)
_FIRST_TEXT = re.compile(rb'\s*+\{\s*+"([^"\\]*+)"\s*+:\s*+"')
_SPACE = re.compile(rb"[ \t\r\n]*+")


def read_json_document(path: Path, limit: int, row_keys: frozenset[str]) -> Iterator[Item]:
    """Yields the rows of the document. An object with one of `row_keys` is itself a row.

    Raises InvalidError `bad_json` when the document ends early or text follows its end.
    """
    begins_row = _begins_row(path, row_keys)
    if path.stat().st_size <= limit:
        alone = json_row(1, path.read_bytes().removeprefix(BOM))
        if begins_row or (isinstance(alone, SourceRow) and row_keys & alone.fields.keys()):
            yield alone
            return
    elif begins_row:
        yield too_long(1, limit)
        return
    keyed = is_keyed(_head(path), row_keys)
    for line, raw in cut_items(path, limit, keyed=keyed):
        yield too_long(line, limit) if raw is None else json_row(line, _LEADING_KEY.sub(b"", raw, 1) if keyed else raw)


def is_keyed(head: bytes, row_keys: frozenset[str]) -> bool:
    """Whether a document is one object whose members are rows: `{"0": {…}, "1": {…}}`, as pandas writes an index."""
    match = _FIRST_OBJECT.match(head)
    if match is None:
        return False
    outer, inner = (name.decode(errors="replace") for name in match.groups())
    return outer.isdecimal() or (inner in row_keys and outer not in row_keys)


def refuse_columns(head: bytes, row_keys: frozenset[str]) -> None:
    """Raises InvalidError `unknown_format` for an object of columns: `{"claim": {"0": …, "1": …}, …}`."""
    match = _FIRST_OBJECT.match(head)
    if match and match.group(1).decode(errors="replace") in row_keys and match.group(2).isdigit():
        raise InvalidError(
            "the file is one JSON object of columns, as pandas writes it by default; "
            "write rows: to_json(…, orient='records', lines=True)",
            code="unknown_format",
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(HEAD).removeprefix(BOM)


def _begins_row(path: Path, row_keys: frozenset[str]) -> bool:
    """Whether the document is an object whose first key is a row's and holds a text."""
    match = _FIRST_TEXT.match(_head(path))
    return match is not None and match.group(1).decode(errors="replace") in row_keys


def cut_items(
    path: Path, limit: int, chunk: int = _CHUNK, *, keyed: bool = False
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (first line, bytes) of each item of the array; None for an item of more than `limit` bytes.

    `keyed`: the items are the members of one object, each with its key.
    """
    cutter = _Cutter(limit, keyed)
    with path.open("rb") as stream:
        if stream.read(len(BOM)) != BOM:
            stream.seek(0)
        while piece := stream.read(chunk):
            yield from cutter.feed(piece)
    cutter.end()


class _Cutter:
    """The scanner's state: its position in a JSON document, and the unfinished item."""

    def __init__(self, limit: int, keyed: bool) -> None:
        self.limit = limit
        self.keyed = keyed
        self.line = 1
        self.depth = 0
        self.home: int | None = None  # nesting depth of the items, while inside their array
        self.arrays = 0
        self.closed = False
        self.in_string = False
        self.escaped = False
        self.item_line: int | None = None
        self.item = bytearray()
        self.over = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        at = counted = 0
        while at < len(chunk):
            start = at
            if self.in_string:
                at = self._through_string(chunk, at)
                self._take(chunk, start, at)
                continue
            if self.item_line is None:
                at = start = _end(_SPACE, chunk, at)
                self.line += chunk.count(b"\n", counted, at)
                counted = at
                if at == len(chunk):
                    break
                self._begin(chunk[at : at + 1])
            at = _end(_PLAIN, chunk, at)
            self._take(chunk, start, at)
            if at < len(chunk):
                yield from self._mark(chunk, at)
                at += 1
        self.line += chunk.count(b"\n", counted)

    def _through_string(self, chunk: bytes, at: int) -> int:
        """The offset after the string's closing quote, or the chunk's end."""
        if self.escaped:
            self.escaped = False
            at += 1
        at = _end(_STRING, chunk, at)
        if at == len(chunk):
            return at
        if chunk[at : at + 1] == b'"':
            self.in_string = False
        else:
            self.escaped = True
        return at + 1

    def _begin(self, character: bytes) -> None:
        """Handles the first character after white space when no item is open."""
        if self.closed or (self.depth == 0 and character not in b"[{"):
            raise self._broken("unexpected text before or after the array or object")
        if self.home == self.depth and character not in b",]}":
            self.item_line = self.line

    def _mark(self, chunk: bytes, at: int) -> Iterator[tuple[int, bytes | None]]:
        character = chunk[at : at + 1]
        if self.home == self.depth and character in b",]}":
            yield from self._finish_item(missing=character == b",")
        elif self.item_line is not None:
            self._take(chunk, at, at + 1)
        if character == b'"':
            self.in_string = True
        elif character in b"[{":
            self._open(character)
        elif character in b"]}":
            self._close()

    def _open(self, character: bytes) -> None:
        self.depth += 1
        if self.keyed and self.depth == 1:
            self.home = 1
        elif character == b"[" and self.home is None and self.depth <= 2:
            self.home = self.depth
            self.arrays += 1
            if self.arrays > 1:
                raise InvalidError(
                    f"line {self.line}: the object holds several arrays; send the array of rows alone",
                    code="ambiguous_array",
                )

    def _close(self) -> None:
        if self.home == self.depth:
            self.home = None
        self.depth -= 1
        self.closed = self.depth == 0

    def _take(self, chunk: bytes, start: int, end: int) -> None:
        if self.item_line is None or self.over:
            return
        self.over = len(self.item) + end - start > self.limit
        if self.over:
            self.item.clear()
        else:
            self.item += chunk[start:end]

    def _finish_item(self, missing: bool) -> Iterator[tuple[int, bytes | None]]:
        if self.item_line is not None:
            yield self.item_line, None if self.over else bytes(self.item)
        elif missing:
            yield self.line, b""
        self.item_line, self.over = None, False
        self.item.clear()

    def end(self) -> None:
        if not self.closed:
            began = f"; the item on line {self.item_line} is not closed" if self.item_line else ""
            raise self._broken(f"the file ends inside the document{began}")

    def _broken(self, what: str) -> InvalidError:
        return InvalidError(
            f"line {self.line}: {what}; send a whole JSON array, or JSONL with one object a line",
            code="bad_json",
        )


def _end(pattern: re.Pattern[bytes], chunk: bytes, at: int) -> int:
    match = pattern.match(chunk, at)
    return match.end() if match else at
