"""The ReAct loop: the model writes Thoughts and chooses Actions; the server runs them and writes the Observations.

It is one synchronous generator of typed events. `/predict` drains it, and the stream forwards it. ReAct: Yao et al.,
2022, arXiv 2210.03629.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from app.domain.claims import STEP_MARKER, Verdict
from app.domain.corpora import Observation
from app.domain.encoding import Encoder
from app.domain.predictions import (
    ActionChosen,
    CitedSentence,
    Observed,
    ObservedText,
    PredictedAction,
    PredictedStep,
    ThoughtWritten,
)
from app.domain.react import CLOSE, TURN_END, Segment, SegmentKind, build_header
from app.domain.trajectories import ActionName
from app.knowledge.base import KnowledgeExplorer
from app.services.prompt_session import PromptSession

REPEATED = "This action was already taken. Use what has been observed, or finish."
TURN_RESERVE = 64
"""Tokens that a turn may need in addition to its Thought."""


@dataclass(slots=True)
class Trace:
    """The result of one run of the loop."""

    steps: list[PredictedStep] = field(default_factory=list)
    read: list[CitedSentence] = field(default_factory=list)
    """The sentences that Observations showed, in order."""

    probabilities: dict[Verdict, float] = field(default_factory=dict)
    verdict: Verdict = Verdict.NOT_ENOUGH_INFO
    forced: bool = False
    search_seconds: float = 0.0

    @property
    def read_a_page(self) -> bool:
        return bool(self.read)


LoopEvent = ThoughtWritten | ActionChosen | Observed


class ReactLoop:
    """One grounded run. `limit`: the sequence length in tokens that the adapter was trained with."""

    def __init__(
        self, session: PromptSession, explorer: KnowledgeExplorer, claim: str, max_steps: int, limit: int
    ) -> None:
        self._session = session
        self._explorer = explorer
        self._claim = claim
        self._max_steps = max_steps
        self._limit = limit
        self._taken_actions: set[tuple[ActionName, str]] = set()
        self._corrected = False
        self._thought = ""
        self.trace = Trace()

    def run(self) -> Iterator[LoopEvent]:
        self._session.start(self._session.encoder.form.render_instructions(self._claim))
        for number in range(1, self._max_steps + 1):
            before = list(self._session.ids)
            yield from self._think(number)
            kind = self._choose_action(last=number == self._max_steps)
            if kind is ActionName.FINISH:
                yield from self._finish(number, before)
                return
            yield from self._act(number, kind)

    def _lacks_room(self) -> bool:
        """Whether the context is too full for this turn and one more."""
        room = self._limit - len(self._session.ids)
        return room < self._session.max_thought_tokens + 2 * TURN_RESERVE

    def _think(self, number: int) -> Iterator[LoopEvent]:
        self._session.append([build_header("Thought", number)])
        # An Observation may leave less room than a Thought takes.
        room = self._limit - len(self._session.ids) - TURN_RESERVE
        self._thought = self._session.generate_thought(max(1, room))
        self._session.append([TURN_END, build_header("Action", number)])
        yield ThoughtWritten(step=number, thought=self._thought)

    def _choose_action(self, *, last: bool) -> ActionName:
        """Choose the kind of action. Lookup is offered only while a page is open.

        Finish is forced at the last step, after a repeated action, and if the context is full.
        """
        offered = {ActionName.SEARCH, ActionName.FINISH}
        if self._explorer.page is not None:
            offered.add(ActionName.LOOKUP)
        chosen, self.trace.forced = self._session.choose_action(
            offered, must_finish=last or self._corrected or self._lacks_room()
        )
        return chosen

    def _act(self, number: int, kind: ActionName) -> Iterator[LoopEvent]:
        argument = self._session.generate_argument()
        action = PredictedAction(name=kind, argument=argument)
        yield ActionChosen(step=number, action=action)
        self._session.append([CLOSE, TURN_END, build_header("Observation", number)])
        observation = self._observe(kind, argument)
        self._session.append([Segment(SegmentKind.OBSERVATION, f" {observation.text}", trained=False), TURN_END])
        self.trace.steps.append(PredictedStep(thought=self._thought, action=action, observation=observation))
        yield Observed(step=number, observation=observation)

    def _observe(self, kind: ActionName, argument: str) -> ObservedText:
        key = (kind, argument.casefold())
        if key in self._taken_actions:
            self._corrected = True
            return ObservedText(text=REPEATED, source="server")
        started = time.monotonic()
        search = kind is ActionName.SEARCH
        found = self._explorer.search(argument) if search else self._explorer.lookup(argument)
        self.trace.search_seconds += time.monotonic() - started
        if search or not found.sentences:  # a repeated Lookup gives its next result, if there is one
            self._taken_actions.add(key)
        return self._fit_observation(found)

    def _fit_observation(self, found: Observation) -> ObservedText:
        """Trim the observation to its token budget, by the rule that training used."""
        encoder: Encoder = self._session.encoder
        budget = encoder.get_observation_budget(len(self._session.ids), self._limit)
        page = self._explorer.page
        text, ids = found.text, found.sentences
        if page is not None and len(ids) > 1:
            sentences = [page.sentences[i] for i in ids]
            fitting = encoder.count_sentences_that_fit(sentences, budget)
            ids = ids[: max(1, fitting)]
            text = " ".join(sentences[:fitting]) if fitting else encoder.clip_sentence(sentences[0], budget)
        else:
            text = encoder.shorten_observation(text, budget)
        if page is not None:
            self._note_read(page.title, page.url, ids, page.sentences)
        return ObservedText(
            text=text,
            page=found.page,
            sentences=ids,
            source=found.source,
            corpus=found.corpus,
            snapshot=found.snapshot,
            trimmed=text != found.text,
        )

    def _note_read(self, page: str, url: str | None, ids: tuple[int, ...], sentences: tuple[str, ...]) -> None:
        known = {(read.page, read.sentence_id) for read in self.trace.read}
        for i in ids:
            if (page, i) not in known and sentences[i]:  # an evaluation's control opens pages without text
                digest = hashlib.sha256(sentences[i].encode()).hexdigest()
                sentence = CitedSentence(page=page, sentence_id=i, text=sentences[i], url=url, sha256=digest)
                self.trace.read.append(sentence)

    def _finish(self, number: int, before: list[int]) -> Iterator[LoopEvent]:
        """Finish with the model's verdict. Then score all three verdicts on the prompt before the last Thought."""
        self.trace.verdict = self._session.choose_verdict()
        action = PredictedAction(name=ActionName.FINISH, argument=self.trace.verdict.value)
        self.trace.steps.append(PredictedStep(thought=self._thought, action=action, observation=None))
        yield ActionChosen(step=number, action=action)
        written, self._session.ids = self._session.ids, before
        self.trace.probabilities = self._session.score_verdicts(number)
        self._session.ids = written


def render_trajectory(trace: Trace) -> str:
    """The trajectory in the user's notation. Step markers inside Thoughts are removed, so no Thought begins a step."""
    lines = []
    for number, step in enumerate(trace.steps, start=1):
        lines.append(f"Thought {number}: {STEP_MARKER.sub('', step.thought)}")
        if step.action:
            lines.append(f"Action {number}: {step.action.name}[{step.action.argument}]")
        if step.observation:
            lines.append(f"Observation {number}: {step.observation.text}")
    return "\n".join(lines)
