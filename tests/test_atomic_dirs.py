"""Atomic directories: whole or absent, readable by other users."""

from pathlib import Path

from app.atomic_dirs import publish


def test_a_directory_appears_whole_and_readable_in_place_of_an_incomplete_one(tmp_path: Path) -> None:
    files, final = tmp_path / ".partial", tmp_path / "final"
    for directory in (files, final):
        directory.mkdir(mode=0o700)
    (files / "weights").write_bytes(b"x")
    (files / "weights").chmod(0o600)
    (final / "half of it").touch()
    publish(files, final)
    assert [path.name for path in final.iterdir()] == ["weights"]
    assert (final.stat().st_mode & 0o777, (final / "weights").stat().st_mode & 0o777) == (0o755, 0o644)
    assert not files.exists()
