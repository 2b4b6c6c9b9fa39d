"""A host's description: its memory is limited by its container."""

from pathlib import Path

import pytest

from worker.cgroup import memory_limit
from worker.device import WORKER_ITSELF, describe_device

NONE_SET = "9223372036854771712"


def written(mount: Path, **files: str) -> None:
    for place, text in files.items():
        path = mount / place.replace("__", "/")
        path = path.with_name({"max": "memory.max", "limit": "memory.limit_in_bytes"}[path.name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/", {"max": "1000"}, 1000),
        ("0::/", {"max": "max"}, None),
        ("0::/system/one.service", {"system__one.service__max": "max", "system__max": "3000"}, 3000),
        ("0::/a/b", {"a__b__max": "1000", "a__max": "3000"}, 1000),
        ("0::/a/b", {"a__b__max": "3000", "a__max": "1000"}, 1000),
        ("5:cpu,memory:/docker/abc\n0::/", {"memory__limit": "2000"}, 2000),  # the path is the host's
        ("5:memory:/x\n3:cpuset:/y", {"memory__x__limit": NONE_SET}, int(NONE_SET)),
        ("5:memory:/x\n0::/x", {"unified__x__max": "500", "memory__x__limit": NONE_SET}, 500),
        ("3:cpuset:/", {"cpuset__max": "1"}, None),
    ],
)
def test_the_least_limit_above_a_process_counts(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "cgroup").write_text(groups + "\n")
    written(tmp_path / "fs", **files)
    assert memory_limit(tmp_path / "cgroup", tmp_path / "fs") == limit


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize(("limit", "left"), [(4 << 30, (4 << 30) - WORKER_ITSELF), (1 << 20, 0)])
def test_a_limit_leaves_less_than_itself_to_a_child(monkeypatch: pytest.MonkeyPatch, limit: int, left: int) -> None:
    monkeypatch.setattr("worker.device._first_gpu", lambda: None)
    monkeypatch.setattr("worker.device.memory_limit", lambda: limit)
    assert describe_device(("gpu",)).bytes == left


def test_a_limit_above_the_machines_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.device._first_gpu", lambda: None)
    monkeypatch.setattr("worker.device.memory_limit", lambda: None)
    whole = describe_device(("gpu",)).bytes
    monkeypatch.setattr("worker.device.memory_limit", lambda: int(NONE_SET))
    assert describe_device(("gpu",)).bytes == whole > 0
