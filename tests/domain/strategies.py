"""Trajectories of every allowed shape, for tests that state properties."""

from collections.abc import Sequence

from hypothesis import strategies as st

from app.domain.claims import CLAIM_LIMIT, STEP_MARKER, Verdict, to_one_line
from app.domain.react import join_text, render_turn
from app.domain.trajectories import Action, ActionName, Evidence, Step, Trajectory

# SentencePiece tokenizers write ▁ for a space, and so cannot tell the two apart.
_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0▁")
_PIECES = st.sampled_from(
    [
        "Thought",
        "Action 1",
        "Observation 2",
        "Label: SUPPORTS",
        "Claim:",
        "Finish[REFUTES]",
        "Episode finished",
        '"quoted"',
        "§",
        ":",
        "]",
        "[",
        "###",
        "</s>",
        "<s>",
        "<unk>",
        "日本",
        "e\u0301",
        "\u0301",
    ]
)


def _plain(text: str) -> bool:
    return STEP_MARKER.search(text) is None and text == to_one_line(text)


lines = (
    st.lists(st.one_of(_PIECES, st.text(_LETTERS, max_size=12)), max_size=8)
    .map(lambda pieces: to_one_line(" ".join(pieces)))
    .filter(_plain)
)
texts = lines.filter(bool)
claims = texts.filter(lambda text: len(text) <= CLAIM_LIMIT)
arguments = (
    lines.map(lambda text: to_one_line(text.replace("[", "").replace("]", ""))[:100].strip())
    .filter(bool)
    .filter(_plain)
)
verdicts = st.sampled_from(list(Verdict))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    name = draw(st.sampled_from([ActionName.SEARCH, ActionName.LOOKUP]))
    action = Action(name=name, argument=draw(arguments))
    return Step(thought=draw(lines), action=action, observation=draw(texts))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    verdict = draw(verdicts)
    last = Step(thought=draw(lines), action=Action(name=ActionName.FINISH, argument=verdict.value))
    evidence = draw(st.lists(st.builds(Evidence, page=texts, sentence=st.integers(0, 500)), max_size=2))
    before = draw(st.lists(steps(), max_size=4))
    return Trajectory(claim=draw(claims), steps=(*before, last), evidence=tuple(evidence))


def steps_text(steps: Sequence[Step]) -> str:
    """The steps in the user's own notation: what a dataset's column holds."""
    lines: list[str] = []
    for number, step in enumerate(steps, start=1):
        lines.append(join_text(render_turn(number, step.thought, step.action)).rstrip("\n"))
        if step.observation is not None:
            lines.append(f"Observation {number}: {step.observation}")
    return "\n".join(lines)
