"""The sources of an evaluation's controls."""

import pytest

from app.domain.corpora import CorpusPage
from app.knowledge.base import KnowledgeExplorer
from app.knowledge.controls import EmptySource, ShuffledSource
from app.knowledge.memory import MemoryKnowledge

TITLES = ["Elbe", "Oder", "Rhine", "Weser"]


@pytest.fixture
def source() -> MemoryKnowledge:
    return MemoryKnowledge([CorpusPage(title=title, sentences=(f"The {title} is a river.",)) for title in TITLES])


def test_an_empty_page_opens_and_shows_nothing(source: MemoryKnowledge) -> None:
    explorer = KnowledgeExplorer(EmptySource(source))
    found = explorer.search("Elbe")
    assert (found.text, found.page) == ("", "Elbe")
    assert explorer.lookup("river").text == "No more results."
    assert explorer.search("Nowhere").page is None


@pytest.mark.parametrize("titles", [TITLES, TITLES[:2], ["Rhine", "Gone", "Elbe"], ["Rhine"], [], ["rhine", "elbe"]])
@pytest.mark.parametrize("seed", range(5))
def test_no_search_opens_the_page_that_it_asked_for(source: MemoryKnowledge, titles: list[str], seed: int) -> None:
    shuffled = KnowledgeExplorer(ShuffledSource(source, titles, seed))
    for title in TITLES:
        found = shuffled.search(title)
        assert title not in found.text
        assert found.text == "" or found.text != f"The {title} is a river."


def test_every_page_of_the_claims_is_shown_for_another(source: MemoryKnowledge) -> None:
    shuffled = KnowledgeExplorer(ShuffledSource(source, TITLES, 1))
    assert sorted(str(shuffled.search(title).page) for title in TITLES) == TITLES
