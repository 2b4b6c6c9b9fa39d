"""Replays the Actions of a trajectory on a corpus: its Observations become what the corpus answers."""

from collections.abc import Sequence

from app.domain.corpora import Observation
from app.domain.quotations import find_quotations
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge.base import KnowledgeExplorer, KnowledgeSource
from app.knowledge.episodes import RowRefused

QUOTED_CHARACTERS = 4
"""Shorter quotations, such as of a letter, are not looked for."""


def replay(trajectory: Trajectory, source: KnowledgeSource) -> list[Observation]:
    """What the corpus answers to each Action before Finish."""
    explorer = KnowledgeExplorer(source)
    return [
        explorer.search(step.action.argument)
        if step.action.name is ActionName.SEARCH
        else explorer.lookup(step.action.argument)
        for step in trajectory.steps[:-1]
    ]


def reground(trajectory: Trajectory, observed: Sequence[Observation]) -> Trajectory:
    """The trajectory with these Observations.

    Raises RowRefused if no Search opened a page, or if a Thought quotes what was observed before and is observed no
    more: a model would learn to invent quotations.
    """
    searches = [step.action.name is ActionName.SEARCH for step in trajectory.steps[:-1]]
    if not any(search and found.page is not None for search, found in zip(searches, observed, strict=True)):
        raise RowRefused("nothing_found", "no Search of the row opens a page of the corpus")
    for number, step in enumerate(trajectory.steps):
        before = [past.observation or "" for past in trajectory.steps[:number]]
        for quoted in find_quotations(step.thought, before):
            text = quoted.strip(" .,")
            was_read = any(text in observation for observation in before)
            is_read = any(text in found.text for found in observed[:number])
            if len(text) >= QUOTED_CHARACTERS and was_read and not is_read:
                raise RowRefused("quotation_lost", f"Thought {number + 1} quotes {text[:80]!r}")
    steps = [
        step.model_copy(update={"observation": found.text})
        for step, found in zip(trajectory.steps, observed, strict=False)
    ]
    return trajectory.model_copy(update={"steps": (*steps, trajectory.steps[-1])})
