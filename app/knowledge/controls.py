"""Sources for an evaluation's controls: the same pages as another source, with nothing or with other things to read."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from app.domain.corpora import CorpusPage
from app.knowledge.base import Hit, KnowledgeSource, SearchResult


class ControlSource(ABC):
    """Answers as `source` does, but `show` replaces the page that a Search opens."""

    def __init__(self, source: KnowledgeSource) -> None:
        self._source = source

    @property
    def kind(self) -> Literal["corpus", "memory"]:
        return self._source.kind

    @property
    def corpus(self) -> str | None:
        return self._source.corpus

    @property
    def snapshot(self) -> str:
        return self._source.snapshot

    def search(self, name: str) -> SearchResult:
        result = self._source.search(name)
        return result if result.page is None else SearchResult(page=self.show(result.page))

    def find(self, query: str, limit: int = 10) -> tuple[Hit, ...]:
        return self._source.find(query, limit)

    def close(self) -> None:  # noqa: B027  not abstract: no control has anything to close
        """The source belongs to its corpus, and stays open."""

    @abstractmethod
    def show(self, page: CorpusPage) -> CorpusPage:
        """The page that opens in place of `page`."""


class EmptySource(ControlSource):
    """Every page opens and has nothing on it. What a model still judges right, it judges by the claim alone."""

    def show(self, page: CorpusPage) -> CorpusPage:
        return CorpusPage(title=page.title, sentences=("",), url=page.url)


class ShuffledSource(ControlSource):
    """Every page opens as another one of `titles`. A model that reads finds nothing about its claim there."""

    def __init__(self, source: KnowledgeSource, titles: Sequence[str], seed: int) -> None:
        super().__init__(source)
        found = {page.title: page for title in titles if (page := source.search(title).page) is not None}
        order = [found[title] for title in sorted(found)]
        random.Random(seed).shuffle(order)
        self._others = {page.title: other for page, other in zip(order, [*order[1:], *order[:1]], strict=True)}

    def show(self, page: CorpusPage) -> CorpusPage:
        other = self._others.get(page.title) or next(iter(self._others.values()), page)
        # With a single title there is no other page: it opens empty.
        return other if other.title != page.title else CorpusPage(title=page.title, sentences=("",), url=page.url)
