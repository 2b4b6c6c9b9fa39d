"""Detects a file's format from its content, then its name, then its content type."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path, PurePath

from app.domain.claims import STEP_MARKER
from app.domain.datasets import Columns
from app.domain.errors import InvalidError
from app.ingest.delimited import header_names, read_delimited
from app.ingest.json_array import is_keyed, read_json_document, refuse_columns
from app.ingest.json_lines import read_json_lines
from app.ingest.lines import BOM, HEAD, Item, with_newlines
from app.ingest.plain_text import read_text
from app.ingest.unsupported import refuse_unsupported

_WAY_OUT = "send CSV, JSONL, JSON or Parquet"


class Format(StrEnum):
    CSV = "csv"
    JSONL = "jsonl"
    JSON = "json"
    PARQUET = "parquet"
    TEXT = "text"


_BY_SUFFIX = {
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSON,
    ".txt": Format.TEXT,
}
_BY_TYPE = {
    "text/csv": Format.CSV,
    "text/tab-separated-values": Format.CSV,
    "application/jsonl": Format.JSONL,
    "application/x-ndjson": Format.JSONL,
    "application/json": Format.JSON,
}


def detect_format(path: Path, filename: str, content_type: str | None, columns: Columns) -> Format:
    """The format of the file at `path`. Raises InvalidError `empty_file`, `unknown_format` or `not_utf8`."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if head.startswith(b"PAR1"):
        return Format.PARQUET
    refuse_unsupported(head, _WAY_OUT)
    text = with_newlines(head.removeprefix(BOM)).lstrip()
    if not text and path.stat().st_size <= HEAD:
        raise InvalidError("the file is empty", code="empty_file")
    suffix = PurePath(filename).suffix.lower()
    named = _BY_SUFFIX.get(suffix) or _BY_TYPE.get((content_type or "").partition(";")[0].strip().lower())
    if text.startswith(b"["):
        return Format.JSON
    if text.startswith(b"{"):
        refuse_columns(text, row_keys(columns))
        if is_keyed(text, row_keys(columns)):
            return Format.JSON
        return _detect_json(text, named, row_keys(columns))
    return _detect_other_text(text, suffix, named, columns)


def row_keys(columns: Columns) -> frozenset[str]:
    """An object with one of these keys is a row."""
    return frozenset({columns.claim, columns.trajectories, "steps", "messages"})


def open_rows(found: Format, path: Path, columns: Columns, limit: int) -> Iterator[Item]:
    """Yields the rows of the file, each of at most `limit` bytes."""
    match found:
        case Format.CSV:
            return read_delimited(path, columns, limit)
        case Format.JSONL:
            return read_json_lines(path, limit)
        case Format.JSON:
            return read_json_document(path, limit, row_keys(columns))
        case Format.TEXT:
            return read_text(path, columns, limit)
        case Format.PARQUET:
            from app.ingest.columnar import (
                read_parquet,
            )  # pyarrow takes longer to start than a small CSV to read

            return read_parquet(path, columns, limit)


def _detect_json(head: bytes, named: Format | None, keys: frozenset[str]) -> Format:
    """The first line begins an object. It is JSONL if the object ends there and is a row or has lines after it."""
    line, newline, rest = head.partition(b"\n")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return named if named in (Format.JSON, Format.JSONL) else _detect_unparsed_json(line, newline)
    if rest.strip() or keys & first.keys() or not any(isinstance(value, list) for value in first.values()):
        return Format.JSONL
    return Format.JSON


def _detect_unparsed_json(line: bytes, newline: bytes) -> Format:
    return Format.JSON if newline and line.strip().endswith((b"{", b"[", b",", b":")) else Format.JSONL


def _detect_other_text(text: bytes, suffix: str, named: Format | None, columns: Columns) -> Format:
    if (columns.claim if columns.kind == "claims" else columns.trajectories) in header_names(text):
        return Format.CSV
    if suffix == ".parquet":
        raise InvalidError(
            "the file's name ends in .parquet, but it is not Parquet; write it again", code="bad_parquet"
        )
    if named in (Format.CSV, Format.JSONL, Format.TEXT):
        return named
    if named is Format.JSON:
        raise InvalidError("line 1: the file begins with neither [ nor {, so it is not JSON", code="bad_json")
    if STEP_MARKER.search(text.decode(errors="replace")):
        return Format.TEXT
    raise InvalidError(f"the file's format is unknown; {_WAY_OUT}", code="unknown_format")
