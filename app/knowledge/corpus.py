"""Searches a corpus file: an immutable SQLite FTS5 database, opened read-only. `building` writes such files."""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

from app.knowledge import index
from app.knowledge.base import CorpusUnreadable, Hit, SearchResult


class CorpusFile:
    """The pages of one corpus file. `snapshot` is the file's SHA-256, computed when not given.

    Raises CorpusUnreadable for a file that is missing or is not a corpus of this format.
    """

    kind: Literal["corpus"] = "corpus"

    def __init__(self, path: Path, corpus: str | None, snapshot: str | None = None) -> None:
        self._uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        self._idle: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._closed = False
        self.corpus = corpus
        try:
            with self._connection() as connection:
                _check_format(connection, path)
            self.snapshot = snapshot or file_digest(path)
        except (sqlite3.Error, OSError) as error:
            raise CorpusUnreadable(f"{path.name} cannot be read as a corpus: {error}") from error

    def search(self, name: str) -> SearchResult:
        """The page that `name` opens, or the most similar titles."""
        with self._connection() as connection:
            return index.search(connection, name)

    def find(self, query: str, limit: int = 10) -> tuple[Hit, ...]:
        """Pages by free text, best first."""
        with self._connection() as connection:
            return index.find(connection, query, limit)

    def close(self) -> None:
        """Closes idle connections. A connection in use is closed when its query ends."""
        self._closed = True
        while (connection := self._take()) is not None:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Takes a connection from the pool for one thread. The pool grows to the peak number of concurrent queries."""
        connection = self._take() or sqlite3.connect(self._uri, uri=True, check_same_thread=False)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if self._closed:
            connection.close()
        else:
            self._idle.put(connection)

    def _take(self) -> sqlite3.Connection | None:
        try:
            return self._idle.get_nowait()
        except Empty:
            return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex: a corpus file's snapshot id."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != index.APPLICATION_ID:
        raise CorpusUnreadable(f"{path.name} is not a Veritune corpus; build it by uploading its pages")
    if version != index.FORMAT:
        raise CorpusUnreadable(
            f"{path.name} has corpus format {version} and this version reads {index.FORMAT}; "
            "build it again by uploading its pages"
        )
