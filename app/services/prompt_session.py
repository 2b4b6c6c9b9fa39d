"""The model's session: one growing prompt of token ids, and the few ways in which a model may add to it.

The server appends every fixed atom; the model is asked for a line, a choice or an argument. Ids that it returns are
kept as they are; a token that holds a stop and something more is replaced by the ids of what stands before the stop.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from app.domain.claims import STEP_MARKER, Verdict
from app.domain.encoding import Encoder
from app.domain.errors import ClientDisconnectedError
from app.domain.predictions import PredictionUsage
from app.domain.react import Segment, SegmentKind, build_action_opening, build_header
from app.domain.trajectories import ARGUMENT_LIMIT, ActionName
from app.generation import GenerationRequest, GenerationResult, Generator

ARGUMENT_PATTERN = rf"[^\[\]\n]{{1,{ARGUMENT_LIMIT}}}\]"
ARGUMENT_TOKENS = 64


@dataclass(slots=True)
class Meter:
    """What the calls of one prediction came to."""

    calls: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    crossed: int = 0
    seconds: float = 0.0
    scoring_seconds: float = 0.0

    def add(self, other: "Meter") -> None:
        self.calls += other.calls
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion
        self.crossed += other.crossed
        self.seconds += other.seconds
        self.scoring_seconds += other.scoring_seconds

    def usage(self) -> PredictionUsage:
        return PredictionUsage(
            calls=self.calls,
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            completion_tokens=self.completion,
            crossed_stops=self.crossed,
        )


IsCancelled = Callable[[], bool]
"""Whether whoever asked has gone."""


def never_cancelled() -> bool:
    """Whoever asked stays, or comes back for the answer."""
    return False


@dataclass(slots=True)
class PromptSession:
    """Writes for one model with one format. `ids` is the prompt so far, BOS included.

    Once whoever asked is `gone`, the model is asked no more: CutOffError.
    """

    generator: Generator
    encoder: Encoder
    model: str
    temperature: float
    top_p: float
    max_thought_tokens: int
    seed: int | None = None
    is_cancelled: IsCancelled = never_cancelled
    ids: list[int] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)

    def start(self, segments: Sequence[Segment]) -> None:
        self.ids = list(self.encoder.encode(segments).ids)

    def append(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self.ids += self.encoder.encode_segment(segment)

    def generate_thought(self, room: int) -> str:
        """Let the model write one Thought of at most `room` tokens. What looks like a step's beginning is cut off."""
        answer = self._generate(max_tokens=min(self.max_thought_tokens, room), stop=("\n",))
        text = answer.text.split("\n", 1)[0]
        if marker := STEP_MARKER.search(text):
            text = text[: marker.start()]
        self.ids += self._fit_ids_to_text(answer.ids, text.rstrip())
        return " ".join(text.split())

    def choose_action(self, offered: set[ActionName], *, must_finish: bool) -> tuple[ActionName, bool]:
        """Let the model choose the kind of action; the chosen atom's own ids are appended.

        Returns (kind, whether Finish was forced on a model that chose otherwise).
        """
        kinds = {token: kind for token, kind in self.encoder.map_action_tokens().items() if kind in offered}
        answer = self._generate(max_tokens=1, allowed=tuple(kinds))
        chosen = kinds[answer.ids[0]]
        forced = must_finish and chosen is not ActionName.FINISH
        kind = ActionName.FINISH if forced else chosen
        self.append([build_action_opening(kind)])
        return kind, forced

    def generate_argument(self) -> str:
        """Let the model write an action's argument, up to the closing bracket, which is not appended."""
        answer = self._generate(max_tokens=ARGUMENT_TOKENS, regex=ARGUMENT_PATTERN)
        text = answer.text.split("]", 1)[0].replace("[", " ")
        self.ids += self._fit_ids_to_text(answer.ids, text)
        return " ".join(text.split())

    def choose_verdict(self) -> Verdict:
        """Let the model choose the label behind `Finish[`; the label's own ids are appended."""
        labels = self.encoder.map_verdict_tokens()
        answer = self._generate(max_tokens=1, allowed=tuple(labels))
        chosen = labels[answer.ids[0]]
        self.append([Segment(SegmentKind.ARGUMENT, chosen.value, trained=True)])
        return chosen

    def score_verdicts(self, step: int) -> dict[Verdict, float]:
        """p(verdict | claim, Observations): a branch with `Finish[` where no Thought has spoken yet.

        `ids` must end behind the last Observation. One forward; nothing is appended.
        """
        labels = self.encoder.map_verdict_tokens()
        branch = list(self.ids)
        for segment in (build_header("Action", step), build_action_opening(ActionName.FINISH)):
            branch += self.encoder.encode_segment(segment)
        answer = self._generate(max_tokens=1, allowed=tuple(labels), logprobs=len(labels), prompt=branch)
        weights = {v: math.exp(answer.first_logprobs.get(t, -math.inf)) for t, v in labels.items()}
        total = sum(weights.values()) or 1.0
        return {verdict: weights[verdict] / total for verdict in Verdict}

    def generate_trajectory(self, max_tokens: int) -> str:
        """Let the model write on its own until it ends (ungrounded mode)."""
        answer = self._generate(max_tokens=max_tokens)
        self.ids += answer.ids
        return answer.text

    def _generate(
        self,
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        regex: str | None = None,
        allowed: tuple[int, ...] | None = None,
        logprobs: int | None = None,
        prompt: list[int] | None = None,
    ) -> GenerationResult:
        if self.is_cancelled():
            raise ClientDisconnectedError("the client has gone")
        started = time.monotonic()
        answer = self.generator.generate(
            GenerationRequest(
                model=self.model,
                prompt=tuple(self.ids if prompt is None else prompt),
                max_tokens=max_tokens,
                temperature=self.temperature if logprobs is None else 0.0,
                top_p=self.top_p,
                seed=self.seed,
                stop=stop,
                regex=regex,
                allowed_token_ids=allowed,
                logprobs=logprobs,
            )
        )
        seconds = time.monotonic() - started
        self.meter.seconds += seconds
        self.meter.scoring_seconds += 0.0 if logprobs is None else seconds
        self.meter.calls += 1
        self.meter.prompt += answer.prompt_tokens
        self.meter.cached += answer.cached_tokens
        self.meter.completion += len(answer.ids)
        return answer

    def _fit_ids_to_text(self, ids: Sequence[int], text: str) -> list[int]:
        """The sampled ids that spell `text`: trailing ids that go beyond it are dropped (an end of sequence too), and
        where one crosses its end, what it had of the text is encoded anew and counted."""
        kept = [token for token in ids if token != self.encoder.tokens.eos_id]
        while kept and not text.startswith(self.encoder.tokens.decode(kept)):
            kept.pop()
        rest = text[len(self.encoder.tokens.decode(kept)) :]
        if rest:
            self.meter.crossed += 1
            kept += self.encoder.tokens.encode(rest)
        return kept
