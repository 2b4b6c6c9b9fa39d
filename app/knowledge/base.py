"""What every knowledge source can do, and one prediction's reading of it.

A source is shared and has no memory of who asked; a `Reading` belongs to one prediction and
remembers the open page and how far a Lookup has come. Neither knows of models or prompts.
"""

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from app.domain.corpora import Observation, Page, caseless, clean, escape_steps

SENTENCES_SHOWN = 5
SIMILAR_SHOWN = 5
ECHO_CHARACTERS = 100


class CorpusUnreadable(Exception):
    """A file is not a corpus that this version can search."""


class SearchResult(BaseModel):
    """The page that a name opens, or the titles of the pages most like it, best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page: Page | None = None
    similar: tuple[str, ...] = ()


class Hit(BaseModel):
    """A page found by free text: `sentence` (its id) is the one that has most of the words.

    `score` is BM25, higher is better, comparable within one answer only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    score: float
    sentence: int
    text: str
    url: str | None = None


class KnowledgeSource(Protocol):
    """A set of pages to search in; safe to share between threads until closed."""

    @property
    def kind(self) -> Literal["corpus", "memory"]:
        """What an Observation gives as its source."""

    @property
    def corpus(self) -> str | None:
        """The corpus id, where there is one."""

    @property
    def snapshot(self) -> str:
        """SHA-256, in hex, of the pages: the same snapshot gives the same answers."""

    def search(self, name: str) -> SearchResult:
        """Open a page by its title, an alias, or a title less its `(disambiguation)`."""

    def find(self, query: str, limit: int = 10) -> tuple[Hit, ...]:
        """Pages by free text, best first; any text is a valid query."""

    def close(self) -> None:
        """Let go of files and connections. Closing twice is fine."""


class Reading:
    """One prediction's way through a source: `search` opens a page, `lookup` walks through it."""

    def __init__(self, source: KnowledgeSource) -> None:
        self._source = source
        self._page: Page | None = None
        self._keyword = ""
        self._given = 0

    @property
    def page(self) -> Page | None:
        """The open page; None before the first Search and after one that missed."""
        return self._page

    def search(self, argument: str) -> Observation:
        """Run `Search[argument]`. A miss closes the open page: a Lookup never reads another."""
        if not clean(argument):
            return _correction("Search needs the name of a page.")
        result = self._source.search(argument)
        self._page, self._keyword, self._given = result.page, "", 0
        if result.page is None:
            return self._observe(_miss(argument, result.similar), ())
        ids = tuple(range(min(SENTENCES_SHOWN, len(result.page.sentences))))
        return self._observe(" ".join(result.page.sentences[i] for i in ids), ids)

    def lookup(self, argument: str) -> Observation:
        """Run `Lookup[argument]`: the next sentence of the open page that has the keyword."""
        keyword = caseless(clean(argument))
        if self._page is None:
            return _correction("There is no open page; Search first.")
        if not keyword:
            return _correction("Lookup needs a keyword.")
        if keyword != self._keyword:
            self._keyword, self._given = keyword, 0
        found = [i for i, text in enumerate(self._page.sentences) if keyword in caseless(text)]
        if self._given == len(found):
            return self._observe("No more results.", ())
        sentence = found[self._given]
        self._given += 1
        place = f"(Result {self._given} / {len(found)})"
        return self._observe(f"{place} {self._page.sentences[sentence]}", (sentence,))

    def _observe(self, text: str, sentences: tuple[int, ...]) -> Observation:
        return Observation(
            text=escape_steps(text),
            page=self._page.title if self._page else None,
            sentences=sentences,
            source=self._source.kind,
            corpus=self._source.corpus,
            snapshot=self._source.snapshot,
        )


def _correction(text: str) -> Observation:
    return Observation(text=text, source="server")


def _miss(argument: str, similar: tuple[str, ...]) -> str:
    name = clean(argument)
    if len(name) > ECHO_CHARACTERS:
        name = name[: ECHO_CHARACTERS - 1] + "…"
    listed = f" Similar: [{', '.join(similar)}]." if similar else ""
    return f"Could not find {name}.{listed}"
