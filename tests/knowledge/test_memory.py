"""Knowledge in memory: what is its own, beside the promises it shares with the corpus file."""

import pytest
from pydantic import ValidationError

from app.domain.corpora import CorpusPage
from app.knowledge.memory import MemoryKnowledge

PAGE = CorpusPage(title="Marlow Bridge", sentences=("It is `` old '' .",), aliases=("The Bridge",))


def test_pages_are_cleaned_as_a_build_cleans_them() -> None:
    memory = MemoryKnowledge([PAGE])
    page = memory.search("the bridge").page
    memory.close()
    assert page == PAGE.model_copy(update={"sentences": ('It is "old".',)})


def test_the_snapshot_is_of_the_pages() -> None:
    snapshots = []
    for pages in ([PAGE], [PAGE, PAGE], [PAGE.model_copy(update={"title": "Other"})]):
        memory = MemoryKnowledge(pages)
        snapshots.append(memory.snapshot)
        memory.close()
    assert snapshots[0] == snapshots[1] != snapshots[2]


def test_a_page_without_words_is_an_error() -> None:
    with pytest.raises(ValidationError, match="sentences"):
        MemoryKnowledge([CorpusPage(title="Blank", sentences=(" \u200b",))])
