"""The schema of a corpus and its queries, over any SQLite connection. Ranking is BM25 by SQLite FTS5.

`corpus` and `memory` own the connections, and `building` fills them, so both kinds of source rank alike.
"""

import json
import re
import sqlite3
from enum import IntEnum

from app.domain.corpora import CorpusPage, clean_page_text, fold_case, page_name_key, page_name_key_without_suffix
from app.knowledge.base import SIMILAR_SHOWN, Hit, SearchResult

APPLICATION_ID = 0x56544350
FORMAT = 1

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE pages (
    id INTEGER PRIMARY KEY, title TEXT NOT NULL, sentences TEXT NOT NULL, aliases TEXT NOT NULL, url TEXT
);
CREATE TABLE names (
    key TEXT, kind INTEGER, page INTEGER, name TEXT, PRIMARY KEY (key, kind, page, name)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5 (
    title, aliases, text, content = '', tokenize = 'porter unicode61 remove_diacritics 2'
);
"""
_TITLE_WEIGHT, _ALIAS_WEIGHT, _TEXT_WEIGHT = 10.0, 5.0, 1.0
_RANKED = f"""
SELECT rowid, bm25(words, {_TITLE_WEIGHT}, {_ALIAS_WEIGHT}, {_TEXT_WEIGHT}) AS score
FROM words WHERE words MATCH ? ORDER BY score, rowid LIMIT ?
"""
_QUERY_CHARACTERS = 1_000
_QUERY_WORDS = 32
_WORD = re.compile(r"[^\s\W_]+(?:['’][^\s\W_]+)*")

# Stop words: BM25 gives them almost no weight, and they take most of the query time.
_COMMON = re.compile("the|a|an|of|in|on|at|by|to|for|from|with|and|as|is|was|are|were|be|it|its|that|this")


class NameKind(IntEnum):
    """The kind of a page's name. Lower kinds take precedence."""

    TITLE = 0
    ALIAS = 1
    BARE_TITLE = 2


def create(connection: sqlite3.Connection) -> None:
    """Creates the tables of an empty corpus."""
    connection.executescript(_SCHEMA)


def add(connection: sqlite3.Connection, number: int, page: CorpusPage) -> None:
    """Adds a cleaned page under the caller's id: 1, 2, 3 …"""
    aliases, sentences = (json.dumps(v, ensure_ascii=False) for v in (page.aliases, page.sentences))
    connection.execute("INSERT INTO pages VALUES (?, ?, ?, ?, ?)", (number, page.title, sentences, aliases, page.url))
    connection.executemany("INSERT OR IGNORE INTO names VALUES (?, ?, ?, ?)", _names(number, page))
    connection.execute(
        "INSERT INTO words (rowid, title, aliases, text) VALUES (?, ?, ?, ?)",
        (number, page.title, " ".join(page.aliases), " ".join(page.sentences)),
    )


def has_title(connection: sqlite3.Connection, title: str) -> bool:
    """Whether a page has exactly this title."""
    query = "SELECT 1 FROM names WHERE key = ? AND kind = ? AND name = ?"
    found = connection.execute(query, (page_name_key(title), NameKind.TITLE, title))
    return found.fetchone() is not None


def optimize(connection: sqlite3.Connection) -> None:
    """Merges the FTS5 index into one segment, which is fastest to read and has reproducible bytes."""
    connection.execute("INSERT INTO words (words) VALUES ('optimize')")


def search(connection: sqlite3.Connection, name: str) -> SearchResult:
    """The page that `name` opens, or the most similar titles."""
    number = _named(connection, name)
    if number is not None:
        return SearchResult(page=_page(connection, number))
    ranked = _ranked(connection, _query_words(name), SIMILAR_SHOWN)
    return SearchResult(similar=tuple(_title(connection, number) for number, _ in ranked))


def find(connection: sqlite3.Connection, query: str, limit: int) -> tuple[Hit, ...]:
    """Pages by free text, best first."""
    words = _query_words(query)
    ranked = _ranked(connection, words, limit)
    return tuple(_hit(_page(connection, number), score, words) for number, score in ranked)


def _names(number: int, page: CorpusPage) -> list[tuple[str, int, int, str]]:
    names: list[tuple[str, int, int, str]] = [(page_name_key(page.title), NameKind.TITLE, number, page.title)]
    names += [(page_name_key(alias), NameKind.ALIAS, number, alias) for alias in page.aliases]
    if bare := page_name_key_without_suffix(page.title):
        names.append((bare, NameKind.BARE_TITLE, number, page.title))
    return names


def _named(connection: sqlite3.Connection, name: str) -> int | None:
    query = "SELECT kind, page, name FROM names WHERE key = ? ORDER BY kind, page LIMIT 50"
    rows: list[tuple[int, int, str]] = connection.execute(query, (page_name_key(name),)).fetchall()
    best = [(page, spelled) for kind, page, spelled in rows if kind == rows[0][0]]
    if not best:
        return None
    if rows[0][0] == NameKind.TITLE:
        wanted = clean_page_text(name.replace("_", " "))
        return next((page for page, spelled in best if spelled == wanted), best[0][0])
    pages = {page for page, _ in best}
    return pages.pop() if len(pages) == 1 else None


def _query_words(text: str) -> tuple[str, ...]:
    """The words of a query, without FTS5 syntax and stop words."""
    words = dict.fromkeys(fold_case(word) for word in _WORD.findall(clean_page_text(text[:_QUERY_CHARACTERS])))
    content_words = [word for word in words if not _COMMON.fullmatch(word)]
    return tuple(content_words or words)[:_QUERY_WORDS]


def _ranked(connection: sqlite3.Connection, words: tuple[str, ...], limit: int) -> list[tuple[int, float]]:
    if not words:
        return []
    query = " OR ".join(f'"{word}"' for word in words)
    return connection.execute(_RANKED, (query, limit)).fetchall()


def _title(connection: sqlite3.Connection, number: int) -> str:
    row = connection.execute("SELECT title FROM pages WHERE id = ?", (number,)).fetchone()
    return str(row[0])


def _page(connection: sqlite3.Connection, number: int) -> CorpusPage:
    query = "SELECT title, sentences, aliases, url FROM pages WHERE id = ?"
    title, sentences, aliases, url = connection.execute(query, (number,)).fetchone()
    return CorpusPage(title=title, sentences=json.loads(sentences), aliases=json.loads(aliases), url=url)


def _hit(page: CorpusPage, score: float, words: tuple[str, ...]) -> Hit:
    wanted = set(words)
    shared = [len(wanted.intersection(_WORD.findall(fold_case(s)))) for s in page.sentences]
    best = shared.index(max(shared))
    # FTS5 gives its best match the lowest number.
    return Hit(title=page.title, score=-score, sentence=best, text=page.sentences[best], url=page.url)
