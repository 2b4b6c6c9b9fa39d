"""The sentences that a prediction cites are those that its last Thought quotes."""

import hashlib

import pytest

from app.domain.claims import Verdict
from app.domain.predictions import CitedSentence
from app.domain.quotations import cite, find_quotations

SENTENCES = ("Brahms was born in Hamburg.", 'He said "never" and left.', "His father was a musician.")
OBSERVED = [" ".join(SENTENCES[:2]), f"(Result 1 / 1) {SENTENCES[2]}"]


def read() -> list[CitedSentence]:
    return [
        CitedSentence(page="Brahms", sentence_id=i, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())
        for i, text in enumerate(SENTENCES)
    ]


@pytest.mark.parametrize(
    ("thought", "ids", "spans", "verified"),
    [
        ('I read "His father was a musician", as claimed.', [2], [(0, 25)], True),
        ("I read “born in Hamburg”, as claimed.", [0], [(11, 26)], True),
        ('It says "He said "never" and left.".', [1], [(0, 25)], True),
        ('"born in Hamburg" and "a musician"', [0, 2], [(11, 26), (15, 25)], True),
        ('"born in Hamburg" and "a plumber"', [0], [(11, 26)], False),
        ('I read "His father was a plumber".', [0, 1, 2], [None] * 3, False),
        ("The page says enough.", [0, 1, 2], [None] * 3, False),
        ('A lone " mark, and an empty one: "".', [0, 1, 2], [None] * 3, False),
        (f'"{OBSERVED[0]}"', [0, 1], [(0, 27), (0, 25)], True),
        ("", [0, 1, 2], [None] * 3, False),
    ],
)
def test_quotations_are_found_again(
    thought: str, ids: list[int], spans: list[tuple[int, int] | None], verified: bool
) -> None:
    cited, found = cite(thought, Verdict.REFUTES, OBSERVED, read())
    assert [one.sentence_id for one in cited] == ids
    assert [one.span for one in cited] == spans
    assert found is verified
    for one in cited:
        assert one.stance == ("refutes" if one.span else "neutral")
        if one.span:
            assert one.text[slice(*one.span)] in thought or thought.count(one.text)


@pytest.mark.parametrize(("verdict", "stance"), [(Verdict.SUPPORTS, "supports"), (Verdict.NOT_ENOUGH_INFO, "neutral")])
def test_the_stance_is_that_of_the_verdict(verdict: Verdict, stance: str) -> None:
    (cited,), _ = cite('"a musician"', verdict, OBSERVED, read())
    assert cited.stance == stance


def test_nothing_read_is_nothing_cited() -> None:
    assert cite('"a musician"', Verdict.SUPPORTS, [], []) == ((), False)
    assert find_quotations('"a" and “b”', []) == ["a", "b"]
