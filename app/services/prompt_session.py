"""A prompt session: one growing prompt of token ids, and the few ways in which a model may extend it.

The server appends every fixed atom. The model generates a Thought, a choice or an argument. Sampled ids are appended
unchanged. If a token crosses the stop, it is replaced by the ids of the text before the stop.
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
    """Sums over the model calls of one prediction."""

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
"""Whether the request is cancelled: its client disconnected."""


def never_cancelled() -> bool:
    """For a request whose answer is wanted in any case: a client may ask again for it by its idempotency key."""
    return False


@dataclass(slots=True)
class PromptSession:
    """Prompts one model in one format. `ids` is the prompt so far, BOS included.

    Every call raises CutOffError once `is_cancelled` returns true.
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
        """Generate one Thought of at most `room` tokens. The text from a step marker on is cut off."""
        answer = self._generate(max_tokens=min(self.max_thought_tokens, room), stop=("\n",))
        text = answer.text.split("\n", 1)[0]
        if marker := STEP_MARKER.search(text):
            text = text[: marker.start()]
        self.ids += self._fit_ids_to_text(answer.ids, text.rstrip())
        return " ".join(text.split())

    def choose_action(self, offered: set[ActionName], *, must_finish: bool) -> tuple[ActionName, bool]:
        """Let the model choose the kind of action, and append the ids of its atom.

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
        """Generate an action's argument, up to the closing bracket. The bracket is not appended."""
        answer = self._generate(max_tokens=ARGUMENT_TOKENS, regex=ARGUMENT_PATTERN)
        text = answer.text.split("]", 1)[0].replace("[", " ")
        self.ids += self._fit_ids_to_text(answer.ids, text)
        return " ".join(text.split())

    def choose_verdict(self) -> Verdict:
        """Let the model choose the label after `Finish[`, and append the ids of the label."""
        labels = self.encoder.map_verdict_tokens()
        answer = self._generate(max_tokens=1, allowed=tuple(labels))
        chosen = labels[answer.ids[0]]
        self.append([Segment(SegmentKind.ARGUMENT, chosen.value, trained=True)])
        return chosen

    def score_verdicts(self, step: int) -> dict[Verdict, float]:
        """p(verdict | claim, Observations), scored on a branch that has `Finish[` right after the last Observation.

        `ids` must end after the last Observation. This is one forward pass, and nothing is appended.
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
        """Generate a whole trajectory until the end of sequence (ungrounded mode)."""
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
            raise ClientDisconnectedError("the client disconnected")
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
        """The sampled ids that decode to `text`. Ids after its end are dropped, an end of sequence too.

        If one id crosses the end of the text, its part of the text is encoded again, and `crossed` counts it.
        """
        fitting = [token for token in ids if token != self.encoder.tokens.eos_id]
        while fitting and not text.startswith(self.encoder.tokens.decode(fitting)):
            fitting.pop()
        rest = text[len(self.encoder.tokens.decode(fitting)) :]
        if rest:
            self.meter.crossed += 1
            fitting += self.encoder.tokens.encode(rest)
        return fitting
