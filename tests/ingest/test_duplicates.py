"""Duplicates in a file: found exactly, in constant memory, and no file is left."""

import subprocess
import sys
from pathlib import Path

from app.ingest.duplicates import open_duplicate_index
from tests.conftest import ROOT
from tests.ingest.files import json_line, read, row


def test_the_value_of_the_first_occurrence_stays(tmp_path: Path) -> None:
    with open_duplicate_index(tmp_path / "index") as index:
        assert index.get_or_insert("Ada wrote it.", "SUPPORTS") is None
        assert index.get_or_insert("Ada wrote it!", "REFUTES") is None
        assert index.get_or_insert("Ada wrote it.", "REFUTES") == "SUPPORTS"
        assert index.get_or_insert("Ada wrote it.", "REFUTES") == "SUPPORTS"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with open_duplicate_index(tmp_path / "index") as index:
        index.get_or_insert("Ada wrote it.", "SUPPORTS")
    assert list(tmp_path.iterdir()) == []
    read(tmp_path, json_line(row(1)))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "canonical"}


def test_a_duplicate_far_behind_is_found(tmp_path: Path) -> None:
    """More digests lie between than the kept part of the file holds."""
    with open_duplicate_index(tmp_path / "index") as index:
        assert all(index.get_or_insert(str(number), "kept") is None for number in range(250_000))
        assert (tmp_path / "index").stat().st_size > 4_000_000
        assert [index.get_or_insert(str(number), "again") for number in (0, 125_000, 249_999)] == ["kept"] * 3


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """In a process of its own, whose peak no other test has raised."""
    code = f"""if True:
        import re
        from pathlib import Path
        from tests.ingest.files import json_line, read, row
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
        folder, source = Path("{tmp_path}"), Path("{tmp_path / "rows.jsonl"}")
        from app.ingest.columns import read_columns
        from app.ingest.canonical import Upload, write_canonical
        for rows in (1_000, 40_000):
            with source.open("wb") as file:
                file.writelines(json_line(row(number)) for number in range(rows))
            before = peak()
            upload = Upload(source, "rows.jsonl", None, read_columns(None))
            report, _ = write_canonical(upload, folder / "out", rows_limit=rows, line_bytes=1 << 20)
            assert report.rows_kept == rows
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 6_000
