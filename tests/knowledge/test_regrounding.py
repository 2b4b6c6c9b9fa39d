"""Old Actions on another corpus: new Observations, and no Thought that quotes what is read no more."""

import pytest

from app.domain.corpora import CorpusPage
from app.domain.trajectories import Step, Trajectory, parse_action
from app.knowledge.episodes import RowRefused
from app.knowledge.memory import MemoryKnowledge
from app.knowledge.regrounding import reground, replay

SOURCE = MemoryKnowledge(
    [
        CorpusPage(title="Elbe", sentences=("The Elbe rises in the Giant Mountains.", "It is 1,112 km long.")),
        CorpusPage(title="Oder", sentences=("The Oder is a river.",)),
    ]
)


def trajectory(*steps: tuple[str, str, str | None]) -> Trajectory:
    made = tuple(Step(thought=t, action=parse_action(a), observation=o) for t, a, o in steps)
    return Trajectory(claim="The Elbe is long.", steps=made)


def test_observations_are_the_corpus_own() -> None:
    old = trajectory(
        ("I read.", "Search[Elba]", "Elba is an island."),
        ("I read on.", "Search[Elbe]", "An old text."),
        ("And on.", "Lookup[km]", "(Result 1 / 9) An old text of 3 km."),
        ("It is long.", "Finish[SUPPORTS]", None),
    )
    new = reground(old, replay(old, SOURCE))
    assert [step.observation for step in new.steps] == [
        "Could not find Elba.",
        "The Elbe rises in the Giant Mountains. It is 1,112 km long.",
        "(Result 1 / 1) It is 1,112 km long.",
        None,
    ]
    assert [(step.thought, step.action) for step in new.steps] == [(step.thought, step.action) for step in old.steps]


@pytest.mark.parametrize(
    ("thought", "code"),
    [
        ('It says "rises in the Giant Mountains".', None),
        ('It says "rises in the Giant Mountains", so it does not.', None),
        ('It says "flows through Dresden".', "quotation_lost"),
        ('I call it "long", as no page does.', None),
    ],
)
def test_a_thought_that_quotes_what_is_read_no_more_is_left_out(thought: str, code: str | None) -> None:
    old = trajectory(
        ("I read.", "Search[Elbe]", "The Elbe rises in the Giant Mountains. The Elbe flows through Dresden."),
        (thought, "Finish[SUPPORTS]", None),
    )
    if code is None:
        assert reground(old, replay(old, SOURCE)).steps[-1].thought == thought
        return
    with pytest.raises(RowRefused) as refused:
        reground(old, replay(old, SOURCE))
    assert refused.value.code == code


def test_a_row_that_opens_no_page_is_left_out() -> None:
    old = trajectory(("I read.", "Search[Rhine]", "The Rhine is long."), ("It is.", "Finish[SUPPORTS]", None))
    with pytest.raises(RowRefused) as refused:
        reground(old, replay(old, SOURCE))
    assert refused.value.code == "nothing_found"
