"""Which texts came before in a file, decided exactly and in constant memory: their digests lie in SQLite, on disk."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path

_PRAGMAS = ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-4000")
"""Nobody reads the file again, so nothing is done to save it; 4 MB of it are kept in memory."""


class Seen:
    """Text → the word that was first said of it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def first(self, text: str, word: str) -> str | None:
        """The word that came with `text` before; None when it comes for the first time, and `word` stays."""
        digest = blake2b(text.encode(), digest_size=16).digest()
        if self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, word)).rowcount:
            return None
        return str(self._execute("SELECT word FROM seen WHERE digest = ?", (digest,)).fetchone()[0])


@contextmanager
def open_seen(path: Path) -> Iterator[Seen]:
    """An empty one, kept at `path` for as long as the block lasts."""
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, word TEXT) WITHOUT ROWID")
            connection.execute("BEGIN")  # without it each row would be a transaction, written at once
            yield Seen(connection)
    finally:
        path.unlink(missing_ok=True)
