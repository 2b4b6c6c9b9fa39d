"""What Dockerfile.gpu promises, as far as it can be seen without an engine; the `api` stage is built for real."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deployment.dockerfile import FILE, Stage, copied_from_here, is_ignored, read_stages

PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_stages()


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([str(PROGRAMS / "hadolint"), str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_copied_path_is_there_and_reaches_the_build(stages: dict[str, Stage]) -> None:
    sources = {source for stage in stages.values() for source in copied_from_here(stage)}
    assert {"app", "worker", "migrations", "pyproject.toml"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not is_ignored(source), source


@pytest.mark.parametrize("path", [".git", ".venv", ".cache", "tests", "docs", "app/__pycache__", ".env"])
def test_what_no_image_needs_stays_out_of_the_build(path: str) -> None:
    assert is_ignored(path)


def test_what_the_package_lists_is_what_the_build_copies(stages: dict[str, Stage]) -> None:
    for name in ("build-api", "build-worker"):
        assert copied_from_here(stages[name]) == ["app", "worker", "migrations"]


def test_images_are_pinned_and_end_without_privileges(stages: dict[str, Stage]) -> None:
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", stages["base"].parent)
    for name in ("api", "worker"):
        assert stages[name].all("USER") == ["10001:10001"]
        assert stages[name].all("HEALTHCHECK")
    assert stages["base"].all("STOPSIGNAL") == ["SIGTERM"]


def test_only_the_worker_gets_torch_and_it_is_a_version_with_cuda(stages: dict[str, Stage]) -> None:
    assert "'.[worker]'" in " ".join(stages["build-worker"].all("RUN"))
    assert "worker]" not in " ".join(stages["build-api"].all("RUN"))
    (pin,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert "+" not in pin, "a local version such as +cpu would shut the ordinary CUDA build out"


def test_nothing_is_installed_unpinned_or_leaves_a_cache(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        for line in stage.all("RUN"):
            for install in re.findall(r"pip install [^&]+", line):
                assert "--no-cache-dir" in install
                assert "-c constraints.txt" in install or "--no-deps" in install
            assert "apt-get install" not in line or "rm -rf /var/lib/apt/lists/*" in line


@pytest.mark.slow
def test_the_api_image_holds_the_application_without_torch(stages: dict[str, Stage], tmp_path: Path) -> None:
    """The stages that make it, carried out line by line with their absolute paths under a private directory."""
    source, environment = tmp_path / "src", tmp_path / "veritune"
    places = {"/src": str(source), "/opt/veritune": str(environment)}
    source.mkdir()
    path = f"{environment / 'bin'}:{PROGRAMS}:{os.environ['PATH']}"
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("VERITUNE_", "PYTHON"))}
    for word, rest in (*stages["build"].instructions, *stages["build-api"].instructions):
        for place, here in places.items():
            rest = rest.replace(place, here)
        if word == "COPY":
            for name in rest.split()[:-1]:
                _copy(ROOT / name, source / name)
        elif word == "RUN":
            subprocess.run(["/bin/sh", "-c", rest], cwd=source, env=settings | {"PATH": path}, check=True)

    def python(code: str) -> "subprocess.CompletedProcess[str]":
        command = [str(environment / "bin" / "python"), "-W", "error", "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)

    for module in ("app.main", "app.cli.commands", "worker.supervisor"):
        done = python(f"import {module}; assert 'site-packages' in {module}.__file__")
        assert done.returncode == 0, done.stderr
    assert "No module named 'torch'" in python("import torch").stderr
    migrated = subprocess.run(
        [environment / "bin" / "veritune", "migrate"], env=settings | {"VERITUNE_HOME": str(tmp_path)}, check=False
    )
    assert migrated.returncode == 0
    assert (tmp_path / "veritune.db").stat().st_size > 0


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)
