"""An in-memory knowledge source for small sets of pages, generators and tests.

It ranks exactly as a corpus file does: both use the same index.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from threading import Lock
from typing import Literal

from app.domain.corpora import CorpusPage, clean_page_text
from app.knowledge import index
from app.knowledge.base import Hit, SearchResult


class MemoryKnowledge:
    """Searches the given pages, cleaned as `build_corpus` cleans them. Of two pages with one title, the first is used.

    Raises ValueError for a page that has no title or no sentence left.
    """

    kind: Literal["memory"] = "memory"

    def __init__(self, pages: Iterable[CorpusPage], corpus: str | None = None) -> None:
        self.corpus = corpus
        self._lock = Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        index.create(self._connection)
        digest = hashlib.sha256()
        for number, page in enumerate(map(_cleaned, pages), start=1):
            if not index.has_title(self._connection, page.title):
                index.add(self._connection, number, page)
                digest.update(page.model_dump_json().encode() + b"\n")
        index.optimize(self._connection)
        self.snapshot = digest.hexdigest()

    def search(self, name: str) -> SearchResult:
        """The page that `name` opens, or the most similar titles."""
        with self._lock:
            return index.search(self._connection, name)

    def find(self, query: str, limit: int = 10) -> tuple[Hit, ...]:
        """Pages by free text, best first."""
        with self._lock:
            return index.find(self._connection, query, limit)

    def close(self) -> None:
        """Frees the pages."""
        self._connection.close()


def _cleaned(page: CorpusPage) -> CorpusPage:
    return CorpusPage(
        title=clean_page_text(page.title),
        sentences=tuple(text for sentence in page.sentences if (text := clean_page_text(sentence))),
        aliases=tuple(text for alias in page.aliases if (text := clean_page_text(alias))),
        url=page.url,
    )
