"""Faults of a disk in words: what failed, why, how much room is left, and the way out."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.domain.errors import StorageError

WAY_OUT = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EACCES: "let this process's user write there",
    errno.EPERM: "let this process's user write there",
    errno.EROFS: "mount it for writing",
}


@contextmanager
def faults_in_words(what: str, directory: Path) -> Iterator[None]:
    """Raise StorageError where the block raises OSError. `what` could not be done in `directory`."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, directory, error.strerror or str(error), error.errno) from error


def disk_error(what: str, directory: Path, reason: str, number: int | None) -> StorageError:
    """The error of code `disk`. `number`: the system's errno, if known."""
    way_out = WAY_OUT.get(number or 0, "check the disk")
    return StorageError(f"{what}: {reason}; {free_space(directory)}; {way_out}", code="disk")


def free_space(directory: Path) -> str:
    """How much room the disk of `directory` has. Works on a directory that does not exist yet."""
    here = next((path for path in (directory, *directory.parents) if path.is_dir()), Path("/"))
    disk = shutil.disk_usage(here)
    return f"{megabytes(disk.free)} of {megabytes(disk.total)} are free at {directory}"


def megabytes(size: int) -> str:
    """As `1,234.5 MB`."""
    return f"{size / 1e6:,.1f} MB"
