"""A directory that is there whole or not at all: written elsewhere, flushed, renamed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold the lock of that file against other processes; its directory is made."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def place(files: Path, final: Path) -> None:
    """Let the directory `files` appear as `final`. What stands there goes: the caller knows that it is not whole."""
    for path in files.iterdir():
        path.chmod(0o644)  # save_pretrained leaves weights that only their writer can read
        _flush(path)
    files.chmod(0o755)
    _flush(files)
    shutil.rmtree(final, ignore_errors=True)
    files.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
