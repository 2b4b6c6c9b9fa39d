"""Blobs in one object store: a directory, memory, S3, GCS or Azure, all through obstore's one API.

A blob's key is the SHA-256 of its bytes, so writing twice is harmless and reading can be checked.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
from obstore.store import from_url
from pydantic import BaseModel, ConfigDict

from app.domain.errors import NotFoundError

CHUNK = 1 << 20

PARTS_AT_ONCE = 2
"""Parts of a file, of 5 MiB each, that are held while they are written. obstore's own 12 are as much memory as the rest
of the API takes."""


class Blob(BaseModel):
    """`digest`: SHA-256 in hex. `size` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    size: int


def open_blobs(url: str) -> "Blobs":
    """The store at `url` (`file:///…`, `memory://`, `s3://bucket/prefix`, …). A local directory is created."""
    if url.startswith("file://"):
        directory = Path(url.removeprefix("file://"))
        directory.mkdir(parents=True, exist_ok=True)
    return Blobs(from_url(url))


class Blobs:
    """Puts and gets whole blobs; nothing is ever changed in place."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def put_bytes(self, content: bytes) -> Blob:
        digest = hashlib.sha256(content).hexdigest()
        obstore.put(self._store, _key(digest), content)
        return Blob(digest=digest, size=len(content))

    def put_file(self, path: Path) -> Blob:
        """Store a file. Read twice (hash, then copy) so that memory stays constant."""
        digest, size = hash_file(path)
        if not self.exists(digest):
            with path.open("rb") as file:
                obstore.put(self._store, _key(digest), file, max_concurrency=PARTS_AT_ONCE)
        return Blob(digest=digest, size=size)

    def exists(self, digest: str) -> bool:
        try:
            obstore.head(self._store, _key(digest))
        except FileNotFoundError:
            return False
        return True

    def size(self, digest: str) -> int:
        """Bytes of the blob. NotFoundError when it is not there."""
        try:
            return int(obstore.head(self._store, _key(digest))["size"])
        except FileNotFoundError:
            raise _gone(digest) from None

    def get_bytes(self, digest: str) -> bytes:
        return b"".join(self.stream(digest))

    def stream(self, digest: str) -> Iterator[bytes]:
        """The blob in chunks of about a mebibyte. NotFoundError when it is not there."""
        try:
            result = obstore.get(self._store, _key(digest))
        except FileNotFoundError:
            raise _gone(digest) from None
        for chunk in result.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    def fetch(self, digest: str, path: Path) -> Path:
        """Copy the blob to `path`, atomically and checked. A file that is there already is trusted."""
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                for chunk in self.stream(digest):
                    seen.update(chunk)
                    file.write(chunk)
                if seen.hexdigest() != digest:
                    raise NotFoundError(f"the stored bytes {digest[:12]}… are damaged", code="blob_damaged")
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)
        return path

    def delete(self, digest: str) -> None:
        try:
            obstore.delete(self._store, _key(digest))
        except FileNotFoundError:
            return


def hash_file(path: Path) -> tuple[str, int]:
    """(SHA-256 in hex, size in bytes) of a file, in constant memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size


def _gone(digest: str) -> NotFoundError:
    return NotFoundError(f"the stored bytes {digest[:12]}… are gone", code="blob_lost")


def _key(digest: str) -> str:
    return f"sha256/{digest[:2]}/{digest}"
