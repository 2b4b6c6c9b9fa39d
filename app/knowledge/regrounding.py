"""Replays the Actions of a trajectory on a corpus: its Observations become what the corpus answers."""

from app.domain.quotations import find_quotations
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge.base import KnowledgeExplorer, KnowledgeSource
from app.knowledge.episodes import EpisodeRefused

QUOTED_CHARACTERS = 4
"""Shorter quotations, such as of a letter, are not looked for."""


def reground(trajectory: Trajectory, source: KnowledgeSource) -> Trajectory:
    """The trajectory with new Observations.

    Raises EpisodeRefused if no Search opens a page, or if a Thought quotes what was observed before and is observed no
    more: a model would learn to invent quotations.
    """
    explorer = KnowledgeExplorer(source)
    steps, opened = [], False
    observed = list[str]()
    for number, step in enumerate(trajectory.steps, start=1):
        before = [past.observation or "" for past in trajectory.steps[: number - 1]]
        for quoted in find_quotations(step.thought, before):
            text = quoted.strip(" .,")
            was_read = any(text in observation for observation in before)
            if len(text) >= QUOTED_CHARACTERS and was_read and not any(text in one for one in observed):
                raise EpisodeRefused("quotation_lost", f"Thought {number} quotes {text[:80]!r}")
        if step.action.name is ActionName.FINISH:
            steps.append(step)
            continue
        search = step.action.name is ActionName.SEARCH
        found = explorer.search(step.action.argument) if search else explorer.lookup(step.action.argument)
        opened |= search and found.page is not None
        observed.append(found.text)
        steps.append(step.model_copy(update={"observation": found.text}))
    if not opened:
        raise EpisodeRefused("nothing_found", "no Search of the row opens a page of the corpus")
    return trajectory.model_copy(update={"steps": tuple(steps)})
