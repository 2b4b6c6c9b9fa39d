"""The lines of a corpus: read as a dataset's are, and another format is called by its name."""

import gzip
import json
from pathlib import Path

import pytest

from app.domain.errors import InvalidError
from app.ingest.corpus_lines import corpus_lines

PAGE = b'{"title": "Elbe", "text": "It is a river."}'
OTHER = b'{"title": "Oder", "text": "It is one, too."}'
BOM = b"\xef\xbb\xbf"


def lines(folder: Path, content: bytes, limit: int = 1_000) -> list[bytes | None]:
    path = folder / "pages"
    path.write_bytes(content)
    return [line if line is None else line.strip() for line in corpus_lines(path, limit)]


@pytest.mark.parametrize(
    "content",
    [
        PAGE + b"\n" + OTHER,
        PAGE + b"\r\n" + OTHER + b"\r\n",
        PAGE + b"\r" + OTHER + b"\r",
        BOM + PAGE + b"\n" + BOM + OTHER + b"\n",
    ],
)
def test_lines_are_read_as_people_end_them(tmp_path: Path, content: bytes) -> None:
    assert lines(tmp_path, content) == [PAGE, OTHER]


def test_a_line_that_is_too_long_is_none_and_takes_no_memory(tmp_path: Path) -> None:
    content = PAGE + b"\n" + b"x" * 300_000 + b"\n" + b"y" * 100 + b"\n" + b"z" * 101 + b"\nlast"
    assert lines(tmp_path, content, limit=100) == [PAGE, None, b"y" * 100, None, b"last"]


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (gzip.compress(PAGE, mtime=0), "unknown_format", "gzip data"),
        (PAGE.decode().encode("utf-16"), "not_utf8", "UTF-16"),
        (PAGE.decode().encode("utf-16-le"), "not_utf8", "UTF-16"),
        (PAGE.decode().encode("utf-32"), "not_utf8", "UTF-16 or UTF-32"),
        (b"PK\x03\x04" + PAGE, "unknown_format", "a ZIP archive"),
        (b"PAR1" + PAGE, "unknown_format", "a Parquet file"),
        (b"<html><p>Elbe", "unknown_format", "an HTML page"),
        (b"[" + PAGE + b"]", "unknown_format", "a JSON array"),
        (b"[\n" + PAGE + b",\n" + OTHER + b"\n]", "unknown_format", "a JSON array"),
        (json.dumps({"0": json.loads(PAGE)}, indent=2).encode(), "unknown_format", "one JSON document"),
        (b"id,title,text\n1,Elbe,It is a river.\n", "unknown_format", "CSV"),
        (b"sep=;\r\ntitle;text\r\nElbe;It is a river.\r\n", "unknown_format", "CSV"),
        (b"title\ttext\rElbe\tIt is a river.\r", "unknown_format", "CSV"),
    ],
)
def test_another_format_is_called_by_its_name(tmp_path: Path, content: bytes, code: str, says: str) -> None:
    with pytest.raises(InvalidError, match=says) as caught:
        lines(tmp_path, content)
    assert caught.value.code == code
    assert "UTF-8" in caught.value.detail if code == "not_utf8" else "one page a line" in caught.value.detail


def test_a_line_that_is_no_page_is_left_to_the_report(tmp_path: Path) -> None:
    assert lines(tmp_path, b'["A"]\n' + PAGE) == [b'["A"]', PAGE]
    assert lines(tmp_path, b'{"broken\n' + PAGE) == [b'{"broken', PAGE]
