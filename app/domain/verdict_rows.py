"""Reduces a trajectory to what its verdict rests on: a short training row of which only the verdict is learned."""

from app.domain.corpora import split_sentences
from app.domain.quotations import find_quotations
from app.domain.trajectories import Step, Trajectory


def reduce_to_quotations(trajectory: Trajectory) -> Trajectory:
    """The steps whose Observations the last Thought quotes, and Finish. An Observation keeps its quoted sentences.

    All Thoughts are empty. If nothing that was observed is quoted, every step stays, with its whole Observation.
    """
    *steps, finish = trajectory.steps
    observations = [step.observation or "" for step in steps]
    quotations = [
        text for text in find_quotations(finish.thought, observations) if any(text in o for o in observations)
    ]
    kept = [
        _reduce(step, quotations)
        for step in steps
        if not quotations or any(q in (step.observation or "") for q in quotations)
    ]
    return trajectory.model_copy(update={"steps": (*kept, finish.model_copy(update={"thought": ""}))})


def _reduce(step: Step, quotations: list[str]) -> Step:
    sentences = [
        sentence
        for sentence in split_sentences(step.observation or "")
        if any(text in sentence or sentence in text for text in quotations)
    ]
    observation = " ".join(sentences) or step.observation
    return step.model_copy(update={"thought": "", "observation": observation})
