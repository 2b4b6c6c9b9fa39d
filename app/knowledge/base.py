"""The interface of a knowledge source, and the Search and Lookup state of one prediction.

A source is stateless and shared by predictions. A `KnowledgeExplorer` belongs to one prediction; it stores the open
page and the position of the current Lookup, as in the ReAct paper's Wikipedia environment (Yao et al. 2022).
"""

from typing import Literal, Protocol

from app.domain.corpora import CorpusPage, Observation, clean_page_text, escape_steps, fold_case
from app.domain.frozen import Frozen

SENTENCES_SHOWN = 5
SIMILAR_SHOWN = 5
ECHO_CHARACTERS = 100


class CorpusUnreadable(Exception):
    """A file is not a corpus that this version can search."""


class SearchResult(Frozen):
    """The page that a name opens, or the most similar titles, best first."""

    page: CorpusPage | None = None
    similar: tuple[str, ...] = ()


class Hit(Frozen):
    """A page found by free text. `sentence` is the id of the sentence with most of the words.

    `score` is BM25, higher is better, comparable within one answer only.
    """

    title: str
    score: float
    sentence: int
    text: str
    url: str | None = None


class KnowledgeSource(Protocol):
    """A searchable set of pages; thread-safe until closed."""

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
        """Releases files and connections. May be called twice."""


class KnowledgeExplorer:
    """Runs one prediction's actions: `search` opens a page, `lookup` steps through its matching sentences."""

    def __init__(self, source: KnowledgeSource) -> None:
        self._source = source
        self._page: CorpusPage | None = None
        self._keyword = ""
        self._results_shown = 0

    @property
    def page(self) -> CorpusPage | None:
        """The open page; None before the first Search and after one that missed."""
        return self._page

    def search(self, argument: str) -> Observation:
        """Run `Search[argument]`. A miss closes the open page: a Lookup never reads another."""
        if not clean_page_text(argument):
            return _correction("Search needs the name of a page.")
        result = self._source.search(argument)
        self._page, self._keyword, self._results_shown = result.page, "", 0
        if result.page is None:
            return self._observe(_miss(argument, result.similar), ())
        ids = tuple(range(min(SENTENCES_SHOWN, len(result.page.sentences))))
        return self._observe(" ".join(result.page.sentences[i] for i in ids), ids)

    def lookup(self, argument: str) -> Observation:
        """Run `Lookup[argument]`: the next sentence of the open page that has the keyword."""
        keyword = fold_case(clean_page_text(argument))
        if self._page is None:
            return _correction("There is no open page; Search first.")
        if not keyword:
            return _correction("Lookup needs a keyword.")
        if keyword != self._keyword:
            self._keyword, self._results_shown = keyword, 0
        found = [i for i, text in enumerate(self._page.sentences) if keyword in fold_case(text)]
        if self._results_shown == len(found):
            return self._observe("No more results.", ())
        sentence = found[self._results_shown]
        self._results_shown += 1
        position = f"(Result {self._results_shown} / {len(found)})"
        return self._observe(f"{position} {self._page.sentences[sentence]}", (sentence,))

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
    name = clean_page_text(argument)
    if len(name) > ECHO_CHARACTERS:
        name = name[: ECHO_CHARACTERS - 1] + "…"
    listed = f" Similar: [{', '.join(similar)}]." if similar else ""
    return f"Could not find {name}.{listed}"
