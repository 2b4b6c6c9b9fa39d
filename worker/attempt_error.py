"""What a fault inside an attempt is called in its job, and whether another attempt may succeed."""

from pathlib import Path

from app.disk import disk_error, free_space
from app.domain.attempts import TrainingFailed
from app.domain.errors import VerituneError
from app.domain.jobs import JobError

TRANSIENT = frozenset({"database_away", "storage_away"})
"""Codes of faults that often pass within seconds. The same call is tried again."""

DISK = "disk"
UNEXPECTED = "unexpected"


def job_error(error: Exception, directory: Path) -> JobError:
    """The fault in words. `directory`: the attempt's own, on whose disk the system's errors happen."""
    if isinstance(error, OSError):
        error = disk_error("a file of the job", directory, error.strerror or str(error), error.errno)
    if isinstance(error, VerituneError):
        hint = error.problems[0].hint if error.problems else None
        return JobError(code=error.code, message=error.detail, hint=hint)
    return JobError(
        code=UNEXPECTED,
        message=f"the attempt stopped at {type(error).__name__}: {error}",
        hint="this is a fault of the worker; its log has the place",
    )


def child_error(failed: TrainingFailed, directory: Path) -> JobError:
    """The child's own words; a full disk is named with the room that is left."""
    room = f"; {free_space(directory)}" if failed.code == DISK else ""
    return JobError(code=failed.code, message=failed.message + room, hint=failed.hint)


def may_pass(error: JobError) -> bool:
    """Whether another attempt may succeed without anybody's help."""
    return error.code in TRANSIENT or error.code == UNEXPECTED
