"""Steps and trajectories: thoughts, actions and observations from a claim to a verdict (ReAct, arXiv:2210.03629)."""

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from app.domain.claims import STEP_MARKER, Claim, Verdict, forbidden_character, parse_verdict, to_one_line
from app.domain.frozen import Frozen
from app.domain.splits import SplitName

ARGUMENT_LIMIT = 100
"""Longest argument of an action that a model may write, in characters."""

DATASET_ARGUMENT_LIMIT = 300
"""Longest argument in a dataset, in characters. It is more than a model may write, so that real rows are accepted."""


class ActionName(StrEnum):
    SEARCH = "Search"
    LOOKUP = "Lookup"
    FINISH = "Finish"


def _one_line(text: str) -> str:
    if bad := forbidden_character(text):
        raise ValueError(f"the text holds {bad}")
    if text != to_one_line(text):
        raise ValueError("the text must be one line, trimmed, with single spaces")
    if marker := STEP_MARKER.search(text):
        raise ValueError(f"the text holds {marker.group(0)!r}, which begins a step")
    return text


def _argument(text: str) -> str:
    if "[" in text or "]" in text:
        raise ValueError("an action's argument must not contain brackets")
    if not text:
        raise ValueError("an action needs an argument")
    if len(text) > DATASET_ARGUMENT_LIMIT:
        raise ValueError(f"an action's argument has at most {DATASET_ARGUMENT_LIMIT} characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Argument = Annotated[Line, AfterValidator(_argument)]


class Action(Frozen):
    """The action of a step: search for a page, look up a word on the open page, or finish with a verdict."""

    name: ActionName
    argument: Argument

    @model_validator(mode="after")
    def _finish_takes_a_verdict(self) -> Self:
        if self.name is ActionName.FINISH and self.argument not in set(Verdict):
            raise ValueError(f"Finish takes SUPPORTS, REFUTES or NOT ENOUGH INFO, not {self.argument!r}")
        return self

    def __str__(self) -> str:
        return f"{self.name}[{self.argument}]"


_ACTION = re.compile(r"(\w+)\s*\[(.*)\]\.?", re.DOTALL)


def parse_action(text: str) -> Action:
    """Parses `Search[…]`, `Lookup[…]` or `Finish[…]`. Raises ValueError for anything else."""
    match = _ACTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:60]!r} is not an action; write Search[…], Lookup[…] or Finish[…]")
    try:
        name = ActionName(match.group(1).capitalize())
    except ValueError:
        raise ValueError(f"{match.group(1)[:40]!r} is not an action; write Search, Lookup or Finish") from None
    argument = to_one_line(match.group(2))
    if name is ActionName.FINISH and (verdict := parse_verdict(argument)):
        argument = verdict.value
    return Action(name=name, argument=argument)


class Step(Frozen):
    """One Thought, Action and Observation. Only the last step has no observation; its action is Finish."""

    thought: Line
    action: Action
    observation: Line | None = None

    @model_validator(mode="after")
    def _observation_unless_finished(self) -> Self:
        finished = self.action.name is ActionName.FINISH
        if finished and self.observation is not None:
            raise ValueError("Finish ends the trajectory; it has no observation")
        if not finished and not self.observation:
            raise ValueError(f"{self.action.name} needs an observation")
        return self


class Evidence(Frozen):
    """A sentence that supports the verdict: the page's title, and the sentence's index on the page, from 0."""

    page: Line
    sentence: int


class Trajectory(Frozen):
    """A claim's steps and verdict. Only the last step is Finish, with that verdict.

    `page`: title of the page that the claim is about, None if the dataset does not say. `split`: from the upload's
    split column, None if there is no such column.
    """

    claim: Claim
    steps: tuple[Step, ...]
    evidence: tuple[Evidence, ...] = ()
    page: Line | None = None
    split: SplitName | None = None

    @model_validator(mode="after")
    def _finishes_once(self) -> Self:
        finishes = [step.action.name is ActionName.FINISH for step in self.steps]
        if not finishes or not finishes[-1] or sum(finishes) != 1:
            raise ValueError("a trajectory ends with its only Finish")
        return self

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.steps[-1].action.argument)
