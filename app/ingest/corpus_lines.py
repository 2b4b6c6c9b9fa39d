"""Reads the lines of an uploaded corpus, which is JSON Lines: one page a line. Other formats are refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path

from app.domain.errors import InvalidError
from app.ingest.delimited import header_names
from app.ingest.lines import BOM, HEAD, numbered_lines, with_newlines
from app.ingest.unsupported import refuse_unsupported

_WAY_OUT = 'send JSON Lines, one page a line: {"title": …, "text": …}'


def corpus_lines(path: Path, limit: int) -> Iterator[bytes | None]:
    """Each line of the file; None for one of more than `limit` bytes.

    Raises InvalidError `unknown_format` or `not_utf8` for another format.
    """
    with path.open("rb") as stream:
        head = stream.read(HEAD)
        refuse_unsupported(head, _WAY_OUT)
        _refuse_other_text(with_newlines(head.removeprefix(BOM)).strip())
        stream.seek(0)
        for _, line in numbered_lines(stream, limit):
            yield line


def _refuse_other_text(head: bytes) -> None:
    first, newline, _ = head.partition(b"\n")
    if "title" in header_names(head):
        raise InvalidError(f"the file is CSV; {_WAY_OUT}", code="unknown_format")
    if head[:1] not in (b"[", b"{") or (newline and _is_json(first)):
        return
    if head.startswith(b"["):
        raise InvalidError(f"the file is a JSON array; {_WAY_OUT}", code="unknown_format")
    if newline and first.rstrip().endswith((b"{", b",", b"[")):
        raise InvalidError(f"the file is one JSON document over several lines; {_WAY_OUT}", code="unknown_format")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
