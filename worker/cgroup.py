"""The memory limit of this process's control groups (cgroup v1 and v2): a container's or a service manager's."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def memory_limit(cgroups: Path = CGROUPS, mount: Path = MOUNT) -> int | None:
    """The lowest limit of all groups above this process, in bytes; None if there is none. "No limit" may also be a
    number that is larger than any machine's memory."""
    limits = [
        int(text) for directory, name in _groups(cgroups, mount) if (text := _text(directory / name).strip()).isdigit()
    ]
    return min(limits, default=None)


def _groups(cgroups: Path, mount: Path) -> Iterator[tuple[Path, str]]:
    """Every directory that may hold a limit, with the name of its file.

    A container may see the host's path here and its own group at the mount: each parent is asked too.
    """
    for line in _text(cgroups).splitlines():
        _number, controllers, path = line.split(":", 2)
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            if not controllers:
                yield mount / group, "memory.max"
                yield mount / "unified" / group, "memory.max"
            elif "memory" in controllers.split(","):
                yield mount / "memory" / group, "memory.limit_in_bytes"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
