"""Contrasts: the same evidence decides the changed claim the other way."""

import pytest

from app.domain.claims import Verdict
from app.domain.contrasts import Contrast, ContrastBuilder

TITLE = "Rhine Gold"
QUOTED = "Rhine Gold is a 1995 film that was made in France by Ada Berg for 2,300 people."
BEFORE = (
    "Oslo is a city in Norway.",
    "It was made by Max Odem.",
    "The show ran for 12 years.",
    "She came in May 1990.",
)


def build(claim: str, label: Verdict, quoted: str = QUOTED) -> set[Contrast | None]:
    """The contrasts over many seeds."""
    found = set()
    for seed in range(40):
        builder = ContrastBuilder(seed)
        for before in BEFORE:
            builder.build(before, Verdict.NOT_ENOUGH_INFO, "", "", "")
        found.add(builder.build(claim, label, TITLE, quoted, quoted))
    return found


def test_a_number_that_was_read_is_replaced_by_one_that_was_not() -> None:
    found = build("Rhine Gold came out 1995.", Verdict.SUPPORTS) - {None}
    assert len(found) > 5
    for contrast in found:
        assert contrast is not None
        assert contrast.label is Verdict.REFUTES
        year = int(contrast.claim.removeprefix("Rhine Gold came out ").removesuffix("."))
        assert 1980 <= year <= 2010
        assert year != 1995


def test_a_number_keeps_its_commas() -> None:
    found = build("Rhine Gold needed 2,300 people.", Verdict.SUPPORTS) - {None}
    assert found
    assert all(contrast is not None and "2," in contrast.claim for contrast in found)


@pytest.mark.parametrize(
    ("claim", "changed"),
    [
        ("Rhine Gold came from a studio in France.", "Rhine Gold came from a studio in Norway."),
        ("Rhine Gold is by Ada Berg.", "Rhine Gold is by Max Odem."),
    ],
)
def test_a_name_is_replaced_by_one_behind_the_same_word(claim: str, changed: str) -> None:
    """`May` is no name, and the page's own words stay."""
    found = {contrast for contrast in build(claim, Verdict.SUPPORTS) if contrast and " not " not in contrast.claim}
    assert found == {Contrast(changed, Verdict.REFUTES)}


def test_what_the_evidence_does_not_name_is_not_replaced() -> None:
    assert build("Rhine Gold came from Italy 1996.", Verdict.SUPPORTS) == {None}


def test_claims_of_both_labels_are_negated_alike() -> None:
    claim = "Rhine Gold is a film."
    for label, other in ((Verdict.SUPPORTS, Verdict.REFUTES), (Verdict.REFUTES, Verdict.SUPPORTS)):
        assert build(claim, label) == {None, Contrast("Rhine Gold is not a film.", other)}


@pytest.mark.parametrize("claim", ["Rhine Gold is not a film.", "Rhine Gold is only a film.", "It is what it was."])
def test_a_claim_that_cannot_be_negated_safely_is_left_alone(claim: str) -> None:
    assert build(claim, Verdict.REFUTES) == {None}


def test_a_claim_that_nothing_decides_has_no_contrast() -> None:
    assert build("Rhine Gold is a 1995 film in France.", Verdict.NOT_ENOUGH_INFO) == {None}


def test_the_same_claims_give_the_same_contrasts() -> None:
    def run() -> list[Contrast | None]:
        builder = ContrastBuilder(3)
        claims = (*BEFORE, "Rhine Gold is a 1995 film.", "Rhine Gold was made in France.")
        return [builder.build(claim, Verdict.SUPPORTS, TITLE, QUOTED, QUOTED) for claim in claims]

    assert run() == run()
