"""The ReAct prompt format (arXiv:2210.03629): how a trajectory is rendered for training, continued, and parsed.

- `render_trajectory(trajectory)`: the segments that training encodes, each with `trained`;
- `render_prompt(claim, steps)`: the segments that serving sends, a prefix of every continuation's;
- `parse_steps(text)`: the steps of a text. It is the inverse of rendering.

A segment is an *atom*: it is encoded alone, so its token ids do not depend on its neighbours. Therefore the ids in
serving equal the ids in training.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from pydantic import model_validator

from app.domain.claims import STEP_MARKER, Verdict
from app.domain.frozen import Frozen
from app.domain.trajectories import Action, ActionName, Step, Trajectory

FORMAT_NAME = "react-1"

DEFAULT_TEMPLATE = (
    "Judge the claim. Search for pages, read them, and finish with SUPPORTS, REFUTES or NOT ENOUGH INFO.\n"
    "Claim: {claim}\n"
)
PLACEHOLDER = "{claim}"
ANY_PLACEHOLDER = re.compile(
    r"\$?\{\{\s*([\w.]+\s*)?([|!][^{}\n]*)?\}\}"  # {{name}}, {{ name | filter }}
    r"|\$?\{\s*([\w.]+\s*)?([|!][^{}\n]*)?\}"  # {name}, ${name}, {}, {0}, {name!r}
    r"|\{%[^{}\n]*%\}"  # {% if name %}
    r"|%\(\w+\)[sdr]"  # %(name)s
)
"""Placeholders in the syntax of Python, Jinja, shells and Ludwig."""
TEMPLATE_LIMIT = 8_000


def unfilled_placeholders(template: str) -> list[str]:
    """The placeholders that nothing fills, in order. Only `{claim}` is filled; others would reach the model."""
    found = [match.group() for match in ANY_PLACEHOLDER.finditer(template)]
    return [one for one in dict.fromkeys(found) if one != PLACEHOLDER]


class SegmentKind(StrEnum):
    """Kind of a segment. The model writes THOUGHT, ACTION and ARGUMENT; the server writes the others.

    Only a TEMPLATE, which comes from a job's config, may contain control tokens such as `<|im_start|>`. In all other
    segments they are plain text.
    """

    TEMPLATE = "template"
    CLAIM = "claim"
    HEADER = "header"
    THOUGHT = "thought"
    ACTION = "action"
    ARGUMENT = "argument"
    CLOSE = "close"
    TURN_END = "turn_end"
    OBSERVATION = "observation"
    END = "end"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of rendered text that is encoded alone. `END` has no text: it is the end-of-sequence token."""

    kind: SegmentKind
    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class RawStep:
    """A step as text, not yet checked. A missing part is None."""

    thought: str | None
    action: str | None
    observation: str | None


def build_header(word: str, number: int) -> Segment:
    """`Thought 3:`, `Action 3:` or `Observation 3:`.

    The first two are trained, so that ungrounded text has the format.
    """
    return Segment(SegmentKind.HEADER, f"{word} {number}:", trained=word != "Observation")


def build_action_opening(name: ActionName) -> Segment:
    return Segment(SegmentKind.ACTION, f" {name}[", trained=True)


def build_label(verdict: Verdict) -> Segment:
    """The argument of Finish."""
    return Segment(SegmentKind.ARGUMENT, verdict.value, trained=True)


CLOSE = Segment(SegmentKind.CLOSE, "]", trained=True)
TURN_END = Segment(SegmentKind.TURN_END, "\n", trained=True)
END = Segment(SegmentKind.END, "", trained=True)


class ReactFormat(Frozen):
    """The prompt format. Every adapter's manifest contains it. Serving refuses an adapter of another format."""

    name: str = FORMAT_NAME
    template: str = DEFAULT_TEMPLATE

    @model_validator(mode="after")
    def _one_placeholder(self) -> Self:
        if self.name != FORMAT_NAME:
            raise ValueError(f"the format {self.name!r} is not known here; this version writes {FORMAT_NAME!r}")
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError("the template must contain {claim} exactly once")
        if len(self.template) > TEMPLATE_LIMIT:
            raise ValueError(f"the template has more than {TEMPLATE_LIMIT:,} characters")
        if STEP_MARKER.search(self.template):
            raise ValueError("the template contains a step marker such as 'Thought 1:'")
        return self

    def render_instructions(self, claim: str) -> list[Segment]:
        """The instructions around the claim, as three segments. All claims share the first one."""
        before, after = self.template.split(PLACEHOLDER)
        pieces = (
            (SegmentKind.TEMPLATE, before),
            (SegmentKind.CLAIM, claim),
            (SegmentKind.TEMPLATE, after.rstrip("\n") + "\n"),
        )
        return [Segment(kind, piece, trained=False) for kind, piece in pieces if piece]

    def render_trajectory(self, trajectory: Trajectory, *, train_on_observations: bool = False) -> list[Segment]:
        """The segments of the whole trajectory, END included."""
        steps = self.render_prompt(trajectory.claim, trajectory.steps, train_on_observations=train_on_observations)
        return [*steps, END]

    def render_prompt(self, claim: str, steps: Sequence[Step], *, train_on_observations: bool = False) -> list[Segment]:
        """The instructions and the given steps: a prefix of `render_trajectory` of any trajectory that begins with
        them."""
        rendered = self.render_instructions(claim)
        for number, step in enumerate(steps, start=1):
            rendered += _render(number, step, train_on_observations)
        return rendered

    def render_verdict_branch(self, claim: str, steps: Sequence[Step]) -> list[Segment]:
        """The prompt that ends in `Finish[` directly after the last observation, without a Thought."""
        opening = [build_header("Action", len(steps) + 1), build_action_opening(ActionName.FINISH)]
        return [*self.render_prompt(claim, steps), *(Segment(s.kind, s.text, False) for s in opening)]

    def render_labelled_branch(self, trajectory: Trajectory) -> list[Segment]:
        """The verdict branch with its label. Only the label, CLOSE and END are trained."""
        opening = self.render_verdict_branch(trajectory.claim, trajectory.steps[:-1])
        return [*(Segment(s.kind, s.text, False) for s in opening), build_label(trajectory.verdict), CLOSE, END]


def render_turn(number: int, thought: str, action: Action) -> list[Segment]:
    """The Thought and the Action of a step, up to the closing bracket."""
    thought_text = [Segment(SegmentKind.THOUGHT, f" {thought}", trained=True)] if thought else []
    argument = Segment(SegmentKind.ARGUMENT, action.argument, trained=True)
    acted = [build_header("Action", number), build_action_opening(action.name), argument, CLOSE]
    return [build_header("Thought", number), *thought_text, TURN_END, *acted]


def _render(number: int, step: Step, train_on_observations: bool) -> list[Segment]:
    rendered = render_turn(number, step.thought, step.action)
    if step.observation is None:
        return rendered
    observed = Segment(SegmentKind.OBSERVATION, f" {step.observation}", trained=train_on_observations)
    line_end = Segment(SegmentKind.TURN_END, "\n", trained=train_on_observations)
    return [*rendered, TURN_END, build_header("Observation", number), observed, line_end]


def join_text(segments: Iterable[Segment]) -> str:
    """The segments as one text."""
    return "".join(segment.text for segment in segments)


def parse_steps(text: str) -> tuple[str, list[RawStep]]:
    """(the text before the first marker, the raw steps). Markers count anywhere in the text.

    A Thought begins a step. An Action begins one if the current step already has an action. An Observation belongs to
    the current step. Numbers are ignored, because real traces repeat and skip them.
    """
    pieces = STEP_MARKER.split(text)
    steps: list[dict[str, str]] = []
    for word, body in zip(pieces[1::3], pieces[3::3], strict=True):
        part = word.lower()
        if not steps or part == "thought" or (part in steps[-1]):
            steps.append({})
        steps[-1][part] = body.strip()
    raw = [RawStep(s.get("thought"), s.get("action"), s.get("observation")) for s in steps]
    return pieces[0], raw


VERDICT_LABELS: tuple[Verdict, ...] = (Verdict.SUPPORTS, Verdict.REFUTES, Verdict.NOT_ENOUGH_INFO)
