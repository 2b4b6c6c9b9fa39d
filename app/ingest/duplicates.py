"""Finds repeated texts in a file exactly and in constant memory: an SQLite index on disk holds their digests."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path

_PRAGMAS = ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-4000")
"""The file is deleted after use, so it needs no protection against a crash. SQLite caches 4 MB of it."""


class DuplicateIndex:
    """Maps a text to the value that was stored with its first occurrence."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def get_or_insert(self, text: str, value: str) -> str | None:
        """The value of the text's first occurrence. For a new text, stores `value` and returns None."""
        digest = blake2b(text.encode(), digest_size=16).digest()
        if self._execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (digest, value)).rowcount:
            return None
        return str(self._execute("SELECT value FROM texts WHERE digest = ?", (digest,)).fetchone()[0])


@contextmanager
def open_duplicate_index(path: Path) -> Iterator[DuplicateIndex]:
    """An empty index in a file at `path`, which is deleted when the block ends."""
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("CREATE TABLE texts (digest BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
            connection.execute("BEGIN")  # one transaction for the file; otherwise SQLite commits each row
            yield DuplicateIndex(connection)
    finally:
        path.unlink(missing_ok=True)
