"""A trajectory reduced to the sentences that its verdict rests on."""

import pytest

from app.domain.trajectories import Step, Trajectory, parse_action
from app.domain.verdict_rows import reduce_to_quotations

RHINE = "The Rhine carries trade. It rises in the Alps. The river flows into the North Sea."


def build_trajectory(last_thought: str) -> Trajectory:
    """A Search that misses, one that opens a page, and a Lookup."""
    written = [
        ("I search.", "Search[Rhin]", "Could not find Rhin. Similar: [Rhine]."),
        ("Again.", "Search[Rhine]", RHINE),
        ("Where does it end?", "Lookup[sea]", "(Result 1 / 1) The river flows into the North Sea."),
        (last_thought, "Finish[SUPPORTS]", None),
    ]
    steps = tuple(Step(thought=t, action=parse_action(a), observation=o) for t, a, o in written)
    return Trajectory(claim="The Rhine rises in the Alps.", steps=steps)


@pytest.mark.parametrize(
    ("last_thought", "left"),
    [
        ('I read: "It rises in the Alps."', [("Search[Rhine]", "It rises in the Alps.")]),
        ("I read: “rises in the Alps”, so yes.", [("Search[Rhine]", "It rises in the Alps.")]),
        (
            'It says "It rises in the Alps. The river flows".',
            [("Search[Rhine]", "It rises in the Alps.")],
        ),
        (
            'It says "(Result 1 / 1) The river flows into the North Sea."',
            [("Lookup[sea]", "(Result 1 / 1) The river flows into the North Sea.")],
        ),
    ],
)
def test_the_quoted_sentences_of_the_quoted_observations_stay(last_thought: str, left: list[tuple[str, str]]) -> None:
    reduced = reduce_to_quotations(build_trajectory(last_thought))
    assert [(str(step.action), step.observation) for step in reduced.steps] == [*left, ("Finish[SUPPORTS]", None)]
    assert not any(step.thought for step in reduced.steps)


@pytest.mark.parametrize("last_thought", ["I know.", "", 'It is "beyond doubt".'])
def test_whatever_was_observed_stays_if_none_of_it_is_quoted(last_thought: str) -> None:
    whole = build_trajectory(last_thought)
    reduced = reduce_to_quotations(whole)
    assert [step.observation for step in reduced.steps] == [step.observation for step in whole.steps]
    assert not any(step.thought for step in reduced.steps)


def test_a_claim_without_steps_stays_as_it_is() -> None:
    finish = Step(thought="", action=parse_action("Finish[REFUTES]"))
    alone = Trajectory(claim="The Rhine is dry.", steps=(finish,))
    assert reduce_to_quotations(alone) == alone
