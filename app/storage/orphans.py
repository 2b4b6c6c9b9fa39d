"""Orphans: files on this host that a killed process left half written, and to which nothing refers."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3_600.0
"""Age at which a file is an orphan. Other processes of this host may be writing such files, and none of them pauses
that long: reading an upload takes a quarter of an hour at most."""


def sweep(directory: Path, *patterns: str) -> None:
    """Delete what matches one of the patterns in `directory` and was last written over STALE_SECONDS ago."""
    for pattern in patterns:
        for path in stale(directory, pattern):
            with contextlib.suppress(OSError):  # already deleted by its owner, or not ours to delete
                _remove(path)


def stale(directory: Path, pattern: str) -> Iterator[Path]:
    """What matches the pattern in `directory` and was last written over STALE_SECONDS ago."""
    before = time.time() - STALE_SECONDS
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # already deleted by its owner
            if _touched(path) < before:
                yield path


def _touched(path: Path) -> float:
    return max(part.lstat().st_mtime for part in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
