"""CSV: the delimiter is found in the header, or in a first line `sep=;`; a quoted field may span lines.

A record with an unclosed quote, or with text after a closing quote, is refused together with all records up to the
next one that has as many fields as the header. A stray quote makes the lines after it unreadable, so one finding names
them all.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from app.domain.datasets import Columns, Finding, SourceRow, build_finding
from app.domain.errors import InvalidError
from app.ingest.columns import check_header
from app.ingest.lines import Header, Item, joined_files, not_utf8, numbered_lines, too_long

DELIMITERS = (",", ";", "\t", "|")
_NAMED_DELIMITER = re.compile(rb"\"?sep=([^\w\s\"]|\t)\"?[\r\n]*", re.IGNORECASE)
"""The line before the header that tells Excel the delimiter."""


class _TooLongError(Exception):
    pass


def header_names(head: bytes) -> list[str]:
    """The column names of a CSV that begins with `head`."""
    first, _, rest = head.partition(b"\n")
    named = _NAMED_DELIMITER.fullmatch(first)
    line = rest.lstrip().partition(b"\n")[0] if named else first
    return _split_header(line, named.group(1).decode() if named else None)[1]


def _split_header(line: bytes, named: str | None) -> tuple[str, list[str]]:
    """(delimiter, column names). Unless it is `named`, the delimiter is the one that makes most names; else a comma."""
    text = line.decode(errors="replace").rstrip("\r\n")
    options = [(delimiter, _names(text, delimiter)) for delimiter in ([named] if named else DELIMITERS)]
    return max(options, key=lambda option: len(option[1]))


def _names(text: str, delimiter: str) -> list[str]:
    try:
        fields = next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []
    return [name.strip() for name in fields]


def read_delimited(path: Path, columns: Columns, limit: int) -> Iterator[Item]:
    """The header, then a row for each record. Raises InvalidError for a header that lacks a column."""
    csv.field_size_limit(limit)
    with path.open("rb") as stream:
        records = _Records(stream, limit)
        header, delimiter = _read_header(records, columns)
        yield header
        yield from _Body(records, header, delimiter).rows()


class _Records:
    """Iterates over lines for the csv module, and tracks the first line and the size of the current record."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.lines = numbered_lines(stream, limit)
        self.limit = limit
        self.line = 0
        self.start = 0
        self.size = 0
        self.text = ""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self.line, raw = next(self.lines)
        self.start = self.start or self.line
        self.size += self.limit + 1 if raw is None else len(raw)
        if raw is None or self.size > self.limit:
            raise _TooLongError
        self.text = raw.decode(errors="surrogateescape")
        return self.text

    def begin(self) -> None:
        self.start = self.size = 0


def _read_header(records: _Records, columns: Columns) -> tuple[Header, str]:
    named: str | None = None
    for number, line in records.lines:
        records.line = number
        if line is None:
            raise InvalidError(
                f"line {number}: the header has more than {records.limit:,} bytes; is this CSV?",
                code="line_too_long",
            )
        if match := _NAMED_DELIMITER.fullmatch(line):
            named = match.group(1).decode(errors="replace")
        elif line.strip():
            return _header(number, line, named, columns)
    raise InvalidError("the file holds only blank lines", code="empty_file")


def _header(number: int, line: bytes, named: str | None, columns: Columns) -> tuple[Header, str]:
    try:
        line.decode()
    except UnicodeDecodeError:
        raise InvalidError(f"line {number}: the header is not UTF-8; save the file as UTF-8", code="not_utf8") from None
    delimiter, names = _split_header(line, named)
    return Header(number, tuple(names), check_header(names, columns)), delimiter


class _Body:
    def __init__(self, records: _Records, header: Header, delimiter: str) -> None:
        self.records = records
        self.header = header
        self.reader = csv.reader(records, delimiter=delimiter, strict=True)
        self.lost: tuple[int, str, str] | None = None  # first line of a broken record, code, reason

    def rows(self) -> Iterator[SourceRow | Finding]:
        while True:
            self.records.begin()
            try:
                fields = next(self.reader)
            except StopIteration:
                break
            except _TooLongError:
                yield from self._over_long()
            except csv.Error as error:
                self.lost = self.lost or (self.records.start, "bad_csv", joined_files(self.records.text) or str(error))
            else:
                yield from self._record(fields)
        yield from self._report_lost()

    def _record(self, fields: list[str]) -> Iterator[SourceRow | Finding]:
        fits = len(fields) == len(self.header.names)
        if not fields or (self.lost and not fits):
            return
        yield from self._report_lost(before=self.records.start)
        if not fits:
            yield build_finding(self.records.start, "wrong_fields", self._wrong_fields(fields))
        elif tuple(name.strip() for name in fields) != self.header.names:  # joined files repeat the header
            yield self._row(fields)

    def _wrong_fields(self, fields: list[str]) -> str:
        counts = f"the row has {len(fields):,} fields, the header {len(self.header.names)}; quote the texts"
        return joined_files(self.records.text) or counts

    def _row(self, fields: list[str]) -> SourceRow | Finding:
        start = self.records.start
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            return not_utf8(start)
        pairs = zip(self.header.names, fields, strict=True)
        return SourceRow(start, {name: text for name, text in pairs if name in self.header.used})

    def _over_long(self) -> Iterator[Finding]:
        """Handles one line that is too long, or a record that grows line by line after an unclosed quote."""
        start, limit = self.records.start, self.records.limit
        if start == self.records.line:
            yield from self._report_lost()
            yield too_long(start, limit)
        why = f"the record has more than {limit:,} bytes"
        self.lost = self.lost or (start, "line_too_long", why) if start < self.records.line else None

    def _report_lost(self, before: int | None = None) -> Iterator[Finding]:
        if self.lost is None:
            return
        start, code, why = self.lost
        last = before - 1 if before else self.records.line
        self.lost = None
        what = "a quote is not closed" if "unexpected end" in why else why
        skipped = f"; lines {start} to {last} are skipped" if last > start else ""
        yield build_finding(start, code, f"{what}{skipped}; close every quote, and double a quote inside a text")
