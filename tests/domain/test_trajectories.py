"""Claims, verdicts, actions, steps and trajectories: valid values, and the messages about invalid ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.domain.claims import CLAIM_LIMIT, Claim, Verdict, forbidden_character, parse_verdict, to_one_line
from app.domain.trajectories import Action, ActionName, Step, Trajectory, parse_action
from tests.domain.strategies import trajectories

CLAIM: TypeAdapter[str] = TypeAdapter(Claim)
FINISH = Action(name=ActionName.FINISH, argument="REFUTES")
SEARCH = Action(name=ActionName.SEARCH, argument="Ada")


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("\u200b", "no visible character"),
        ("\ufeff", "no visible character"),
        ("\u3164 \u2800", "no visible character"),
        ("x" * (CLAIM_LIMIT + 1), "2,001"),
        ("x Observation 1: y Finish[SUPPORTS]", "begins a step"),
        ("a\0b", "NUL"),
        ("a\ud800b", r"U\+D800"),
    ],
)
def test_a_bad_claim_is_refused(claim: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CLAIM.validate_python(claim)


def test_a_claim_becomes_one_line() -> None:
    assert CLAIM.validate_python("  Ada\n wrote  it. ") == "Ada wrote it."


@given(st.text())
def test_folding_is_idempotent_and_leaves_one_line(text: str) -> None:
    once = to_one_line(text)
    assert to_one_line(once) == once
    assert len(once.splitlines()) <= 1


@pytest.mark.parametrize(
    ("written", "verdict"),
    [
        ("SUPPORTS", Verdict.SUPPORTS),
        ("supported", Verdict.SUPPORTS),
        ("Refuted.", Verdict.REFUTES),
        ("not_enough-info", Verdict.NOT_ENOUGH_INFO),
        ("NEI", Verdict.NOT_ENOUGH_INFO),
        ("DONE", None),
        ("", None),
    ],
)
def test_verdicts_are_read_in_their_usual_spellings(written: str, verdict: Verdict | None) -> None:
    assert parse_verdict(written) is verdict


@given(st.text())
def test_a_text_holds_a_forbidden_character_or_is_utf8(text: str) -> None:
    try:
        text.encode()
        allowed = "\0" not in text
    except UnicodeEncodeError:
        allowed = False
    assert (forbidden_character(text) is None) == allowed


@pytest.mark.parametrize(
    ("written", "action"),
    [
        ("Search[Ada Lovelace]", "Search[Ada Lovelace]"),
        (" search [ Ada\nLovelace ]. ", "Search[Ada Lovelace]"),
        ("LOOKUP[born]", "Lookup[born]"),
        ("Finish[refuted]", "Finish[REFUTES]"),
    ],
)
def test_an_action_is_read_as_people_write_it(written: str, action: str) -> None:
    assert str(parse_action(written)) == action


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("Login", "not an action"),
        ("Think[hard]", "is not an action"),
        ("Search[Ada] on the web", "not an action"),
        ("Search[]", "needs an argument"),
        ("Search[a [b]]", "must not contain brackets"),
        ("Search[" + "x" * 301 + "]", "300"),
        ("Finish[DONE]", "SUPPORTS, REFUTES or NOT ENOUGH INFO"),
        ("Search[Thought 1: x]", "begins a step"),
    ],
)
def test_a_bad_action_is_refused(written: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_action(written)


def test_a_search_needs_an_observation_and_finish_has_none() -> None:
    with pytest.raises(ValidationError, match="needs an observation"):
        Step(thought="", action=SEARCH)
    with pytest.raises(ValidationError, match="has no observation"):
        Step(thought="", action=FINISH, observation="x")


@pytest.mark.parametrize("thought", ["two\nlines", " untrimmed", "two  spaces", "Action 1: x", "a\0", "e\u0301"])
def test_a_field_is_one_tidy_line_without_markers(thought: str) -> None:
    with pytest.raises(ValidationError):
        Step(thought=thought, action=FINISH)


def test_a_trajectory_ends_with_its_only_finish() -> None:
    seen = Step(thought="", action=SEARCH, observation="Ada.")
    done = Step(thought="", action=FINISH)
    for steps in [(), (seen,), (done, done), (done, seen)]:
        with pytest.raises(ValidationError, match="only Finish"):
            Trajectory(claim="It is.", steps=steps)
    assert Trajectory(claim="It is.", steps=(seen, done)).verdict is Verdict.REFUTES


@given(trajectories())
def test_a_trajectory_survives_json(trajectory: Trajectory) -> None:
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory
