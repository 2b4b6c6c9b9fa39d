"""The model cache of this host: `models/<digest>/`, complete or absent, and how a source becomes one.

A directory appears by rename, after its files are on the disk; `description.json` inside makes it a model.
`sources/<digest of the source>` remembers what a source that never changes led to.
"""

import os
import shutil
from pathlib import Path

from app.atomic_dirs import locked, publish
from app.domain.base_models import (
    BaseModelDescription,
    DirectorySource,
    GgufSource,
    HubSource,
    ModelSource,
    canonical_digest,
)
from worker.models.describe import describe
from worker.models.errors import BaseModelError
from worker.models.fetch import copy_directory, gguf_file, hub_snapshot, is_commit, say

DESCRIPTION = "description.json"


class ModelStore:
    """The models under one cache directory. Any number of processes may use it at once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache.resolve()
        self.models = self.cache / "models"
        self.sources = self.cache / "sources"

    def obtain(self, name: str, source: ModelSource) -> BaseModelDescription:
        """The model of `source`, made present on this host. At once when it is here already."""
        key = canonical_digest(source.model_dump(mode="json"))
        if known := self._remembered(key, name):
            return known
        with locked(self.models / f".lock-{key[:16]}"):
            return self._remembered(key, name) or self._make(key, name, source)

    def ensure(self, name: str, source: ModelSource, digest: str) -> BaseModelDescription:
        """As `obtain`, for a model known elsewhere by its digest. Raises BaseModelError when it differs."""
        if known := self._present(digest, name):
            return known
        made = self.obtain(name, source)
        if made.digest != digest:
            raise BaseModelError(
                "digest_mismatch",
                f"{name} is known by digest {digest}, but its source gives {made.digest} on this host",
                "the source has changed: add it under a new name, or copy the model from the first host",
            )
        return made

    def _present(self, digest: str, name: str) -> BaseModelDescription | None:
        directory = self.models / digest
        try:
            found = BaseModelDescription.model_validate_json((directory / DESCRIPTION).read_bytes())
            sizes = [(directory / file).stat().st_size for file in found.files if file.endswith(".safetensors")]
        except (OSError, ValueError):
            return None
        return found.model_copy(update={"name": name, "path": directory}) if sum(sizes) == found.bytes else None

    def _remembered(self, key: str, name: str) -> BaseModelDescription | None:
        try:
            return self._present((self.sources / key).read_text().strip(), name)
        except OSError:
            return None

    def _make(self, key: str, name: str, source: ModelSource) -> BaseModelDescription:
        partial = self.models / f".partial-{key[:16]}"
        shutil.rmtree(partial, ignore_errors=True)
        files = partial / "model"
        files.mkdir(parents=True)
        try:
            described = self._gather(name, source, partial, files)
            self._publish(described, files)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        final = described.model_copy(update={"path": self.models / described.digest})
        if isinstance(source, GgufSource) or (isinstance(source, HubSource) and is_commit(source.revision)):
            self.sources.mkdir(exist_ok=True)
            _write(self.sources / key, final.digest)
        return final

    def _gather(self, name: str, source: ModelSource, partial: Path, files: Path) -> BaseModelDescription:
        revision, licence = None, None
        if isinstance(source, GgufSource):
            gguf = gguf_file(source, self.cache / "downloads", partial / "gguf")
            say("converting to safetensors")
            os.environ.setdefault("TQDM_DISABLE", "1")  # a bar is noise in a log, and it is read at import
            from worker.models.convert import convert_gguf  # torch takes seconds to import

            convert_gguf(gguf, files)
            revision, licence = source.revision, source.licence
        elif isinstance(source, DirectorySource):
            copy_directory(source, files)
        else:
            revision, licence = hub_snapshot(source, files)
            source = source.model_copy(update={"revision": revision})
        say("hashing and describing")
        return describe(files, name=name, source=source, revision=revision, licence=licence)

    def _publish(self, described: BaseModelDescription, files: Path) -> None:
        if self._present(described.digest, described.name):
            return
        final = self.models / described.digest
        (files / DESCRIPTION).write_text(described.model_copy(update={"path": final}).model_dump_json(indent=2))
        # What stands there is no complete model: two processes may bring the same one from two sources.
        publish(files, final)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
