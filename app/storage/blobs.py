"""Blobs in one object store: a directory, memory, S3, GCS or Azure, all through obstore's one API.

A blob's key is the SHA-256 of its bytes, so a repeated write is harmless and every read can be verified.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import from_url

from app.disk import disk_error, faults_in_words, megabytes
from app.domain.errors import NotFoundError, StorageError
from app.domain.frozen import Frozen

CHUNK = 1 << 20

PARTS_AT_ONCE = 2
"""Parts of a file, of 5 MiB each, in memory while it is written. obstore's default of 12 takes as much memory as the
whole rest of the API."""

_SYSTEM_ERROR = re.compile(r"(?P<reason>[^:\n]+) \(os error (?P<number>\d+)\)")

log = structlog.get_logger(__name__)


class Blob(Frozen):
    """`digest`: SHA-256 in hex. `size` in bytes."""

    digest: str
    size: int


def open_blobs(url: str) -> "Blobs":
    """The store at `url` (`file:///…`, `memory://`, `s3://bucket/prefix`, …). A local directory is created."""
    if url.startswith("file://"):
        directory = Path(url.removeprefix("file://"))
        directory.mkdir(parents=True, exist_ok=True)
        return Blobs(from_url(url), directory)
    return Blobs(from_url(url))


class Blobs:
    """Puts and gets whole blobs. A blob never changes. `directory`: the store's, if it is on this host's disk.

    Every method raises StorageError if the store fails: code `disk` from a local disk, else `storage_away`.
    """

    def __init__(self, store: Any, directory: Path | None = None) -> None:
        self._store = store
        self._directory = directory

    def staged(self) -> "StagedBlobs":
        """The same store, which records the blobs that are new."""
        return StagedBlobs(self._store, self._directory)

    def put_bytes(self, content: bytes) -> Blob:
        digest = hashlib.sha256(content).hexdigest()
        self._put_new(Blob(digest=digest, size=len(content)), content)
        return Blob(digest=digest, size=len(content))

    def put_file(self, path: Path) -> Blob:
        """Store a file. Read twice (hash, then copy) so that memory stays constant."""
        digest, size = hash_file(path)
        blob = Blob(digest=digest, size=size)
        with path.open("rb") as file:
            self._put_new(blob, file)
        return blob

    def _put_new(self, blob: Blob, content: bytes | IO[bytes]) -> bool:
        """Store the blob unless it is there. Returns whether it was new."""
        if self.exists(blob.digest):
            return False
        with self._faults_in_words(f"a blob of {megabytes(blob.size)} cannot be stored"):
            obstore.put(self._store, _key(blob.digest), content, max_concurrency=PARTS_AT_ONCE)
        return True

    def exists(self, digest: str) -> bool:
        try:
            with self._faults_in_words("a blob cannot be looked up"):
                obstore.head(self._store, _key(digest))
        except FileNotFoundError:
            return False
        return True

    def size(self, digest: str) -> int:
        """Bytes of the blob. Raises NotFoundError if it is missing."""
        try:
            with self._faults_in_words("a blob cannot be looked up"):
                return int(obstore.head(self._store, _key(digest))["size"])
        except FileNotFoundError:
            raise _blob_lost(digest) from None

    def get_bytes(self, digest: str) -> bytes:
        return b"".join(self.stream(digest))

    def stream(self, digest: str) -> Iterator[bytes]:
        """The blob in chunks of about one MiB. Raises NotFoundError if it is missing."""
        try:
            with self._faults_in_words("a blob cannot be read"):
                chunks = iter(obstore.get(self._store, _key(digest)).stream(min_chunk_size=CHUNK))
        except FileNotFoundError:
            raise _blob_lost(digest) from None
        while True:
            with self._faults_in_words("a blob cannot be read"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield bytes(chunk)

    def fetch(self, digest: str, path: Path) -> Path:
        """Copy the blob to `path` atomically, and verify its digest. An existing file is trusted."""
        if not path.exists():
            with faults_in_words("a blob cannot be copied to this host", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(digest, path)
        return path

    def _fetch(self, digest: str, path: Path) -> None:
        sha256 = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                for chunk in self.stream(digest):
                    sha256.update(chunk)
                    file.write(chunk)
                if sha256.hexdigest() != digest:
                    raise NotFoundError(f"the stored bytes {digest[:12]}… are damaged", code="blob_damaged")
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)

    def delete(self, digest: str) -> None:
        try:
            with self._faults_in_words("a blob cannot be deleted"):
                obstore.delete(self._store, _key(digest))
        except FileNotFoundError:
            return

    def discard(self, digests: Iterable[str]) -> None:
        """Delete blobs to which nothing refers. A fault of the store is logged only: it costs room and no data."""
        for digest in digests:
            try:
                self.delete(digest)
            except StorageError as error:
                log.warning("orphan_blob_left", blob=digest, reason=error.detail)

    @contextmanager
    def _faults_in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as error:
            raise self._in_words(what, error) from error

    def _in_words(self, what: str, error: Exception) -> StorageError:
        found = _SYSTEM_ERROR.search(str(error))
        reason = found["reason"].strip() if found else str(error).partition("\n")[0]
        if self._directory is None:
            return StorageError(f"{what}: the store answers {reason!r}", retry_after=2)
        return disk_error(what, self._directory, reason, int(found["number"]) if found else None)


class StagedBlobs(Blobs):
    """Blobs that wait for the row that will refer to them. `created`: those that were new."""

    def __init__(self, store: Any, directory: Path | None = None) -> None:
        super().__init__(store, directory)
        self.created: set[str] = set()
        self._reused: list[Path | bytes] = []

    def put_bytes(self, content: bytes) -> Blob:
        return self._record(super().put_bytes(content), content)

    def put_file(self, path: Path) -> Blob:
        return self._record(super().put_file(path), path)

    def put_missing(self) -> None:
        """Store reused blobs again: another process may have deleted them before the row was committed."""
        for content in self._reused:
            super().put_bytes(content) if isinstance(content, bytes) else super().put_file(content)

    def _record(self, blob: Blob, content: Path | bytes) -> Blob:
        if blob.digest not in self.created:
            self._reused.append(content)
        return blob

    def _put_new(self, blob: Blob, content: bytes | IO[bytes]) -> bool:
        new = super()._put_new(blob, content)
        if new:
            self.created.add(blob.digest)
        return new


def hash_file(path: Path) -> tuple[str, int]:
    """(SHA-256 in hex, size in bytes) of a file, in constant memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size


def _blob_lost(digest: str) -> NotFoundError:
    return NotFoundError(f"the stored bytes {digest[:12]}… are gone", code="blob_lost")


def _key(digest: str) -> str:
    return f"sha256/{digest[:2]}/{digest}"
