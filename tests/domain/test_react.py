"""The prompt format: parsing is the inverse of rendering, and a prompt is a prefix of its continuations."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.claims import Verdict
from app.domain.datasets import Columns, Severity, SourceRow
from app.domain.react import (
    CLOSE,
    DEFAULT_TEMPLATE,
    END,
    TURN_END,
    ReactFormat,
    Segment,
    SegmentKind,
    build_action_opening,
    build_header,
    join_text,
    parse_steps,
    render_turn,
)
from app.domain.rows import read_row
from app.domain.trajectories import Action, ActionName, Step, Trajectory
from tests.domain.strategies import steps_text, trajectories

FORMAT = ReactFormat()

EXAMPLE = Trajectory(
    claim="Ada wrote a program.",
    steps=(
        Step(
            thought="I should search Ada.",
            action=Action(name=ActionName.SEARCH, argument="Ada"),
            observation="Ada wrote the first program.",
        ),
        Step(thought="It is true.", action=Action(name=ActionName.FINISH, argument="SUPPORTS")),
    ),
)


def test_a_trajectory_is_written_in_the_users_own_notation() -> None:
    assert join_text(FORMAT.render_trajectory(EXAMPLE)) == (
        "Judge the claim. Search for pages, read them, and finish with SUPPORTS, REFUTES or NOT ENOUGH INFO.\n"
        "Claim: Ada wrote a program.\n"
        "Thought 1: I should search Ada.\n"
        "Action 1: Search[Ada]\n"
        "Observation 1: Ada wrote the first program.\n"
        "Thought 2: It is true.\n"
        "Action 2: Finish[SUPPORTS]"
    )


@given(trajectories())
def test_a_rendered_trajectory_is_parsed_back(trajectory: Trajectory) -> None:
    written = join_text(FORMAT.render_trajectory(trajectory))
    row = SourceRow(1, {"claim": trajectory.claim, "trajectories": written})
    reading = read_row(row, Columns())
    assert reading.trajectory == trajectory.model_copy(update={"evidence": ()})
    assert not [found for found in reading.findings if found.severity is Severity.REFUSED]


@given(trajectories())
def test_rendered_steps_are_parsed_back_without_a_repair(trajectory: Trajectory) -> None:
    row = SourceRow(1, {"claim": trajectory.claim, "trajectories": steps_text(trajectory.steps)})
    reading = read_row(row, Columns())
    assert reading.trajectory == trajectory.model_copy(update={"evidence": ()})
    assert {found.code for found in reading.findings} <= {"control_token_text"}


@given(trajectories(), st.data())
def test_a_prompt_begins_every_continuation(trajectory: Trajectory, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, len(trajectory.steps) - 1))
    prompt = FORMAT.render_prompt(trajectory.claim, trajectory.steps[:done])
    segments = FORMAT.render_trajectory(trajectory)
    assert segments[: len(prompt)] == prompt
    assert join_text(segments).startswith(join_text(prompt))


@given(trajectories())
def test_observations_are_trained_only_with_the_option(trajectory: Trajectory) -> None:
    seen = [s for s in FORMAT.render_trajectory(trajectory) if s.kind is SegmentKind.OBSERVATION]
    assert len(seen) == len(trajectory.steps) - 1
    assert not any(segment.trained for segment in seen)
    asked = FORMAT.render_trajectory(trajectory, train_on_observations=True)
    assert all(segment.trained for segment in asked if segment.kind is SegmentKind.OBSERVATION)


@given(trajectories())
def test_the_end_of_a_turn_is_always_trained(trajectory: Trajectory) -> None:
    segments = FORMAT.render_trajectory(trajectory)
    assert segments[-1] == END
    assert END.trained
    for before, ending in pairwise(segments):
        if ending.kind is SegmentKind.TURN_END and before.kind is not SegmentKind.OBSERVATION:
            assert ending.trained, "the newline behind a thought or an action"
    for number, step in enumerate(trajectory.steps, start=1):
        assert all(segment.trained for segment in render_turn(number, step.thought, step.action))


@given(trajectories())
def test_the_instructions_are_never_trained(trajectory: Trajectory) -> None:
    head = FORMAT.render_prompt(trajectory.claim, ())
    assert {segment.kind for segment in head} == {SegmentKind.TEMPLATE, SegmentKind.CLAIM}
    assert not any(segment.trained for segment in head)


@given(trajectories())
def test_the_verdict_branch_learns_only_the_verdict(trajectory: Trajectory) -> None:
    asked = FORMAT.render_verdict_branch(trajectory.claim, trajectory.steps[:-1])
    branch = FORMAT.render_labelled_branch(trajectory)
    assert join_text(branch).startswith(join_text(asked))
    assert join_text(asked).endswith(f"Action {len(trajectory.steps)}: Finish[")
    learned = [segment for segment in branch if segment.trained]
    assert [s.text for s in learned] == [trajectory.verdict.value, "]", ""]


def test_atoms_are_cut_around_arguments() -> None:
    assert render_turn(2, "Hm.", Action(name=ActionName.LOOKUP, argument="Ada")) == [
        build_header("Thought", 2),
        Segment(SegmentKind.THOUGHT, " Hm.", True),
        TURN_END,
        build_header("Action", 2),
        build_action_opening(ActionName.LOOKUP),
        Segment(SegmentKind.ARGUMENT, "Ada", True),
        CLOSE,
    ]


def test_markers_count_anywhere_and_their_numbers_are_ignored() -> None:
    before, steps = parse_steps("Hi Thought 1: a Action 1: Search[b] Observation 7: c Action 1: d Observation 2: e")
    assert before == "Hi "
    assert [(s.thought, s.action, s.observation) for s in steps] == [
        ("a", "Search[b]", "c"),
        (None, "d", "e"),
    ]


def test_a_text_without_markers_has_no_steps() -> None:
    assert parse_steps("nothing here") == ("nothing here", [])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("no placeholder", "exactly once"),
        ("{claim} {claim}", "exactly once"),
        ("{claim}" + "x" * 8_000, "8,000"),
        ("Thought 1: {claim}", "step marker"),
    ],
)
def test_a_template_that_would_not_be_read_back_is_refused(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ReactFormat(template=template)


def test_a_format_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="react-9"):
        ReactFormat(name="react-9")


def test_a_template_always_ends_its_line_before_the_first_step() -> None:
    bare = ReactFormat(template="{claim}")
    assert join_text(bare.render_prompt("It is.", ())) == "It is.\n"
    assert DEFAULT_TEMPLATE.endswith("\n")


def test_verdicts_are_spelled_so_on_the_wire() -> None:
    assert [verdict.value for verdict in Verdict] == ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"]
