"""What a file is: its content first, then its name, then its content type."""

import json
from pathlib import Path

import pytest

from app.domain.datasets import Columns
from app.domain.errors import InvalidError
from app.ingest.columns import read_columns
from app.ingest.formats import Format, detect_format
from tests.ingest.files import STEPS, json_line, read, row

KEYED = json.dumps({"0": row(1), "1": row(2)})
TABLE = b"claim,trajectories\nOne.,x\n"


def recognised(folder: Path, content: bytes, name: str = "upload", content_type: str | None = None) -> Format:
    path = folder / "file"
    path.write_bytes(content)
    return detect_format(path, name, content_type, Columns())


@pytest.mark.parametrize(
    ("content", "name", "content_type", "format_"),
    [
        (b"PAR1....PAR1", "a.csv", None, Format.PARQUET),
        (b" [", "a.csv", "text/csv", Format.JSON),
        (json_line(row()), "a.csv", None, Format.JSONL),
        (json_line(row()), "a.json", "application/json", Format.JSONL),
        (json_line({"data": [row()]}), "a", None, Format.JSON),
        (b'{\n "claim": "x"\n}', "a", None, Format.JSON),
        (KEYED.encode(), "a.jsonl", None, Format.JSON),
        (json.dumps({"a7": row(1)}, indent=2).encode(), "a", None, Format.JSON),
        (json_line({"meta": {"0": 1}, "data": [row()]}), "a", None, Format.JSON),
        (json_line(row()).replace(b"\n", b"\r") * 2, "a", None, Format.JSONL),
        (TABLE.replace(b",", b"|"), "a", None, Format.CSV),
        (b"sep=;\r\n" + TABLE.replace(b",", b";"), "a", None, Format.CSV),
        (TABLE.replace(b"\n", b"\r"), "a", None, Format.CSV),
        (b'{"broken', "a.jsonl", None, Format.JSONL),
        (b'{"broken\n{', "a", None, Format.JSONL),
        (b'{"broken', "a.json", None, Format.JSON),
        (b"broken\n" + json_line(row()), "a.jsonl", None, Format.JSONL),
        (TABLE, "a.txt", "text/plain", Format.CSV),
        (TABLE.replace(b",", b";"), "a", None, Format.CSV),
        (b"a\tb\n", "a.tsv", None, Format.CSV),
        (b"a", "a", "text/csv; charset=utf-8", Format.CSV),
        (f"One. {STEPS}".encode(), "README", None, Format.TEXT),
        (b"words", "a.TXT", None, Format.TEXT),
    ],
)
def test_content_goes_before_the_name(
    tmp_path: Path, content: bytes, name: str, content_type: str | None, format_: Format
) -> None:
    assert recognised(tmp_path, content, name, content_type) is format_


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "empty_file", "empty"),
        (b" \r\n\t", "empty_file", "empty"),
        (b"\xef\xbb\xbf", "empty_file", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "unknown_format", "a PNG image"),
        (b"PK\x03\x04rest", "unknown_format", "Excel"),
        (b"\x1f\x8b\x08rest", "unknown_format", "gzip"),
        (b"%PDF-1.7", "unknown_format", "a PDF"),
        (b"\n<!DOCTYPE html><p>", "unknown_format", "an HTML page"),
        (b"<?xml version='1.0'?>", "unknown_format", "an XML document"),
        (bytes(range(32)) * 4, "unknown_format", "binary"),
        (b'{"claim": {"0": "One.", "1": "Two."}, "trajectories": {}}', "unknown_format", "orient='records'"),
        ("claim,trajectories".encode("utf-16"), "not_utf8", "UTF-16"),
        ("claim,trajectories".encode("utf-16-le"), "not_utf8", "UTF-16"),
        (b"a", "missing_column", "found: 'a'"),
        (b"{", "no_rows_kept", "bad_json: 1"),
        (b"\0", "unknown_format", "binary"),
    ],
)
def test_what_is_no_dataset_says_what_it_is(tmp_path: Path, content: bytes, code: str, says: str) -> None:
    with pytest.raises(InvalidError, match=says) as caught:
        read(tmp_path, content, "upload.csv")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b"words", "a", "unknown_format"),
        (b"words", "a.json", "bad_json"),
        (b"words", "a.parquet", "bad_parquet"),
        (b"words", "a.jsonl", "no_rows_kept"),
        (b"\n" * 70_000, "a.csv", "empty_file"),
    ],
)
def test_a_name_that_its_content_does_not_keep(tmp_path: Path, content: bytes, name: str, code: str) -> None:
    with pytest.raises(InvalidError) as caught:
        read(tmp_path, content, name)
    assert caught.value.code == code


@pytest.mark.parametrize("given", [{"claims": "x"}, {"claim": " "}])
def test_a_mapping_of_columns_is_checked(given: dict[str, str]) -> None:
    with pytest.raises(InvalidError) as caught:
        read_columns(given)
    assert caught.value.code == "bad_columns"
