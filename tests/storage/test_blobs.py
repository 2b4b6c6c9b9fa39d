"""Blobs: the same promises from a directory and from memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.errors import NotFoundError, StorageError
from app.storage import Blobs, open_blobs
from tests.conftest import ROOT


@pytest.fixture(params=["file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return open_blobs(f"file://{tmp_path / 'blobs'}" if request.param == "file" else "memory:///")


def test_what_is_put_comes_back_by_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"some bytes" * 300_000)
    stored = blobs.put_file(source)
    assert stored.size == 3_000_000
    assert blobs.put_bytes(source.read_bytes()) == stored
    assert blobs.get_bytes(stored.digest) == source.read_bytes()
    assert blobs.fetch(stored.digest, tmp_path / "deep" / "copy").read_bytes() == source.read_bytes()


def test_large_files_are_put_in_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak no other test has raised. Several, since parts pile up by chance."""
    code = f"""if True:
        import re
        from pathlib import Path
        from app.storage import open_blobs
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
        blobs, large = open_blobs("file://{tmp_path / "blobs"}"), Path("{tmp_path / "large"}")
        before = peak()
        for mebibytes in (150, 151, 152, 153):
            with large.open("wb") as file:
                file.truncate(mebibytes << 20)
            blobs.delete(blobs.put_file(large).digest)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 40


def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    assert blobs.get_bytes(blobs.put_bytes(b"").digest) == b""


def test_a_lost_blob_is_said_so_and_leaves_no_file(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_bytes(b"x").digest
    blobs.delete(digest)
    blobs.delete(digest)
    assert not blobs.exists(digest)
    with pytest.raises(NotFoundError, match="are gone"):
        blobs.fetch(digest, tmp_path / "here" / "copy")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_damaged_blob_is_not_handed_out(tmp_path: Path) -> None:
    blobs = open_blobs(f"file://{tmp_path / 'blobs'}")
    digest = blobs.put_bytes(b"right").digest
    (tmp_path / "blobs" / "sha256" / digest[:2] / digest).write_bytes(b"wrong")
    with pytest.raises(NotFoundError, match="damaged"):
        blobs.fetch(digest, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_directory_that_fails_says_what_where_and_how_much_is_free(tmp_path: Path) -> None:
    blobs = open_blobs(f"file://{tmp_path / 'blobs'}")
    (tmp_path / "blobs" / "sha256").touch()  # a file where a directory must be
    for call in (lambda: blobs.put_bytes(b"x"), lambda: blobs.exists("0" * 64), lambda: blobs.get_bytes("0" * 64)):
        with pytest.raises(StorageError, match=rf"Not a directory; .* MB are free at {tmp_path}/blobs") as raised:
            call()
        assert raised.value.code == "disk"


def test_a_blob_that_was_deleted_before_its_row_was_committed_is_stored_again(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    digests = {blobs.put_file(source).digest, blobs.put_bytes(b"y").digest}
    staged = blobs.staged()
    staged.put_file(source)
    staged.put_bytes(b"y")
    staged.put_bytes(b"z")
    assert len(staged.created) == 1
    blobs.discard(digests)
    staged.put_missing()
    assert all(blobs.exists(digest) for digest in digests)
