"""What killed processes left is swept; what others are at work on stays."""

import os
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.composition import Services
from app.main import create_app
from app.storage.orphans import STALE_SECONDS, sweep

OLD = time.time() - STALE_SECONDS - 60


def aged(path: Path) -> Path:
    for part in (*path.rglob("*"), path):
        os.utime(part, (OLD, OLD), follow_symlinks=False)
    return path


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half of it")
    return path


def test_old_files_and_folders_go_and_others_stay(tmp_path: Path) -> None:
    file(tmp_path / "upload-folder" / "deep" / "file")
    file(tmp_path / "kept" / "file")
    gone = [aged(file(tmp_path / "upload-file")), aged(tmp_path / "upload-folder"), tmp_path / "upload-link"]
    gone[-1].symlink_to(tmp_path / "kept")
    aged(gone[-1])
    stay = [file(tmp_path / "upload-fresh"), aged(file(tmp_path / "other")), aged(tmp_path / "kept")]

    sweep(tmp_path, "upload-*")

    assert [path for path in gone if path.is_symlink() or path.exists()] == []
    assert [path for path in stay if not path.exists()] == []
    assert (tmp_path / "kept" / "file").exists()


def test_a_folder_that_is_written_into_is_in_use(tmp_path: Path) -> None:
    file(tmp_path / "upload-folder" / "deep" / "file")
    written = aged(tmp_path / "upload-folder") / "deep" / "file"
    os.utime(written)
    sweep(tmp_path, "upload-*")
    assert written.exists()


def test_a_directory_that_is_not_there_is_swept(tmp_path: Path) -> None:
    sweep(tmp_path / "nowhere", "upload-*")


def test_an_upload_that_comes_in_sweeps_those_that_never_did(services: Services) -> None:
    left = services.datasets.scratch_file()
    fresh = services.datasets.scratch_file()
    assert left.exists()
    aged(left)
    services.datasets.scratch_file()
    assert (left.exists(), fresh.exists()) == (False, True)


@pytest.mark.parametrize(
    "left",
    [
        "home/work/uploads/upload-x",
        "home/work/uploads/ingest-x/.ingest-y/canonical.jsonl",
        "cache/corpora/.build-x/corpus.sqlite",
        "cache/corpora/.0123.sqlite.x",
        "cache/adapters/.partial-x/adapter_model.safetensors",
    ],
)
def test_the_api_sweeps_when_it_starts(services: Services, tmp_path: Path, left: str) -> None:
    path = file(tmp_path / left)
    aged(tmp_path / Path(left).parts[0])
    settings = services.settings.model_copy(update={"cache": tmp_path / "cache"})
    swept = Services(settings)
    for fresh in (False, True):
        if fresh:
            file(path)
        with TestClient(create_app(swept)):
            assert path.exists() is fresh
