"""Reads a text file of trajectories. Each begins with its claim, then an optional `Label: …`, then `Thought 1: …`.

    ### The claim. Label: SUPPORTS Thought 1: … Action 1: Search[…] Observation 1: … Thought 2: …

A trajectory may span lines. The next one begins at a line that
- starts with `###` or `Claim:`, or
- follows a blank line and does not start with a step marker, or
- has text before its own `Thought 1:`, when the current trajectory already has its `Thought 1:`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from app.domain.claims import STEP_MARKER
from app.domain.datasets import Columns, Finding, SourceRow
from app.ingest.lines import Item, not_utf8, numbered_lines, too_long

_OPENING = re.compile(rb"\s*(?:###|Claim:)")
_MARKER = re.compile(rb"\s*(?:Thought|Action|Observation)\s*\d+\s*:")
_FIRST = re.compile(rb"\bThought\s*1\s*:")
_LABEL = re.compile(r"\bLabel\s*:")


def read_text(path: Path, columns: Columns, limit: int) -> Iterator[Item]:
    """Yields a row for each trajectory, with the line where it begins."""
    record = _Record(limit)
    with path.open("rb") as stream:
        for number, line in numbered_lines(stream, limit):
            if record.ends_before(line):
                yield record.row(columns)
                record = _Record(limit)
            record.add(number, line)
    if record.start:
        yield record.row(columns)


class _Record:
    """The lines of one trajectory so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.start = 0
        self.text = bytearray()
        self.over = False
        self.blank = False
        self.opened = False

    def ends_before(self, line: bytes | None) -> bool:
        if not self.start or (line is not None and not line.strip()):
            return False
        if line is None:
            return self.blank
        if _OPENING.match(line):
            return True
        if _MARKER.match(line):
            return False
        return self.blank or (self.opened and _FIRST.search(line) is not None)

    def add(self, number: int, line: bytes | None) -> None:
        self.blank = line is not None and not line.strip()
        if self.blank:
            return
        self.start = self.start or number
        self.over = self.over or line is None or len(self.text) + len(line) > self.limit
        if line is not None and not self.over:
            self.text += line
            self.opened = self.opened or _FIRST.search(line) is not None

    def row(self, columns: Columns) -> SourceRow | Finding:
        return too_long(self.start, self.limit) if self.over else _row(self.start, bytes(self.text), columns)


def _row(line: int, raw: bytes, columns: Columns) -> SourceRow | Finding:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return not_utf8(line)
    marker = STEP_MARKER.search(text)
    at = marker.start() if marker else len(text)
    labels = list(_LABEL.finditer(text, 0, at))
    cut = labels[-1].start() if labels else at
    claim = text[:cut].strip("# \t\r\n").removeprefix("Claim:").strip()
    return SourceRow(line, {columns.claim: claim, columns.trajectories: text[cut:]})
