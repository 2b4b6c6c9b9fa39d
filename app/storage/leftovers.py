"""Files on this host that a process was at work on when it was killed, and that nobody will ever look for."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3_600.0
"""Longer than anything here goes untouched while it is worked on: reading an upload takes a quarter of an hour at most.
Other processes of this host may have such files in hand at any time, so it is age that must tell."""


def sweep(directory: Path, *patterns: str) -> None:
    """Remove what matches one of the patterns in `directory` and has not been written to for long."""
    for pattern in patterns:
        for path in stale(directory, pattern):
            with contextlib.suppress(OSError):  # its owner has just removed it, or it is not ours to remove
                _remove(path)


def stale(directory: Path, pattern: str) -> Iterator[Path]:
    """What matches the pattern in `directory` and has not been written to for long."""
    before = time.time() - STALE_SECONDS
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # its owner has just removed it
            if _touched(path) < before:
                yield path


def _touched(path: Path) -> float:
    return max(part.lstat().st_mtime for part in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
