"""Atomic directories: written under another name, flushed, then renamed. A reader sees all of it or nothing."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold the file `lock` against other processes. Its directory is created."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(files: Path, final: Path) -> None:
    """Rename the directory `files` to `final`. An incomplete directory at `final` is replaced."""
    for path in files.iterdir():
        path.chmod(0o644)  # save_pretrained writes weights that only its own user can read
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
