"""The child that reads an upload: what it hands back, what stops it, and that nothing is left behind."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from app.domain.datasets import read_canonical
from app.domain.errors import InvalidError
from app.ingest import IngestLimits, IngestResult, ingest
from tests.ingest.files import STEPS, json_line, row

GOOD = json_line(row(1)) + json_line(row(2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def upload(out: Path, content: bytes, name: str = "a.jsonl", **limits: float) -> IngestResult:
    source = out.parent / "source"
    source.write_bytes(content)
    return ingest(source, name, None, out, limits=IngestLimits(**limits))  # type: ignore[arg-type]


def refused(out: Path, content: bytes, name: str = "a.jsonl", **limits: float) -> InvalidError:
    """The error; and not one file is left behind."""
    with pytest.raises(InvalidError) as caught:
        upload(out, content, name, **limits)
    assert list(out.iterdir()) == []
    return caught.value


def test_a_dataset_is_called_by_the_digest_of_its_rows(out: Path) -> None:
    result = upload(out, GOOD)
    content = result.canonical.read_bytes()
    assert result.digest == hashlib.sha256(content).hexdigest()
    assert result.canonical == out / f"{result.digest}.jsonl"
    assert [read_canonical(line).claim[-2] for line in content.splitlines()] == ["1", "2"]
    assert (result.rows, result.report.rows_kept) == (2, 2)
    assert list(out.iterdir()) == [result.canonical]


def test_the_same_rows_in_another_format_are_the_same_dataset(out: Path) -> None:
    table = pyarrow.Table.from_pylist([row(1), row(2)])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    from_parquet = upload(out, bytes(sink.getvalue()))
    from_json = upload(out, json.dumps([row(1, label="supports", id=3), row(2)]).encode())
    assert from_parquet.digest == from_json.digest == upload(out, GOOD).digest
    assert len(list(out.iterdir())) == 1


def test_columns_are_mapped(out: Path) -> None:
    source = out.parent / "source"
    source.write_bytes(json_line({"statement": "One.", "trace": STEPS}))
    result = ingest(source, "a", None, out, columns={"claim": "statement", "trajectories": "trace"})
    assert result.report.columns == {"claim": "statement", "trajectories": "trace"}


def test_an_error_crosses_the_process_with_its_places(out: Path) -> None:
    error = refused(out, b"claim,trace\nOne.,x\n", "a.csv")
    assert error.code == "missing_column"
    assert error.problems[0].loc == ("trajectories_column",)
    assert error.problems[0].hint == "did you mean 'trace'? Send trajectories_column=trace"


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b"", "a.csv", "empty_file"),
        (b"a", "a.csv", "missing_column"),
        (b"\x89PNG\r\n\x1a\n" + os.urandom(500), "a.csv", "unknown_format"),
        (os.urandom(4_096), "a.csv", None),
        (b"[" * 100_000 + b"]" * 100_000, "a.json", "no_rows_kept"),
        (b'{"a":' * 100_000, "a.jsonl", "no_rows_kept"),
        (b"PAR1" + os.urandom(200) + b"\x08\0\0\0PAR1", "a.parquet", "bad_parquet"),
        (json_line(row(1, claim="a\ud800")), "a.jsonl", "no_rows_kept"),
        (b"{\n" * 10_000, "a.jsonl", "no_rows_kept"),
    ],
)
def test_bad_input_is_a_clear_error_and_leaves_nothing(out: Path, content: bytes, name: str, code: str | None) -> None:
    error = refused(out, content, name)
    assert code is None or error.code == code
    assert len(error.detail) > 15


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_of_fifty_megabytes_is_refused_in_little_memory(out: Path, name: str) -> None:
    long = b"x" * 50_000_000
    head = GOOD if name == "a.jsonl" else b'claim,trajectories\nOne.,"' + STEPS.encode() + b'"\n'
    content = head + (b'{"claim": "' + long + b'"}\n' if name == "a.jsonl" else long + b",x\n") + b"\n"
    result = upload(out, content, name, memory_bytes=400 << 20)
    assert [(f.line, f.code) for f in result.report.findings] == [(3 if name == "a.jsonl" else 7, "line_too_long")]
    assert "1,048,576 bytes" in result.report.findings[0].message


def test_the_only_line_is_too_long(out: Path) -> None:
    error = refused(out, b'{"claim": "' + b"x" * 3_000_000)
    assert (error.code, error.problems[0].hint) == ("no_rows_kept", "line_too_long")


def test_a_small_file_that_unfolds_to_gigabytes_is_stopped(out: Path) -> None:
    huge = pyarrow.array(["x" * 4_000_000] * 64)
    table = pyarrow.table({"claim": huge, "trajectories": huge})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    content = bytes(sink.getvalue())
    assert len(content) < 100_000
    error = refused(out, content, "bomb.parquet", memory_bytes=500 << 20)
    assert (error.code, "500 MiB of memory" in error.detail) == ("too_much_memory", True)


def test_a_child_that_takes_too_long_is_ended(out: Path) -> None:
    error = refused(out, GOOD * 20_000, wall_seconds=0.5)
    assert (error.code, "0.5 seconds" in error.detail) == ("too_slow", True)


def test_a_child_that_computes_too_long_is_ended(out: Path) -> None:
    many = b"".join(json_line(row(number)) for number in range(60_000))
    error = refused(out, many, cpu_seconds=1)
    assert (error.code, "1 seconds of processor time" in error.detail) == ("too_slow", True)


def test_a_child_without_memory_is_ended(out: Path) -> None:
    many = b"".join(json_line(row(number)) for number in range(60_000))
    error = refused(out, many, memory_bytes=1 << 20)
    assert error.code in ("too_much_memory", "reader_died")


def test_a_file_that_grows_too_big_is_ended(out: Path) -> None:
    many = b"".join(json_line(row(number)) for number in range(10_000))
    error = refused(out, many, output_bytes=1 << 20)
    assert (error.code, "1 MiB on disk" in error.detail) == ("too_large", True)


def test_a_file_that_is_not_there_is_the_callers_fault(out: Path) -> None:
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        ingest(out / "nowhere", "a.csv", None, out)
    assert list(out.iterdir()) == []


def test_the_child_sees_none_of_the_deployments_secrets(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.ingest import child

    monkeypatch.setenv("VERITUNE_API_KEY", "secret")
    assert "secret" not in str(child._environment())


def test_pyarrow_is_loaded_for_parquet_alone() -> None:
    script = "import sys, app.ingest.__main__, app.ingest.canonical; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
