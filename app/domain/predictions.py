"""Predictions: a claim judged, with the steps taken and the sentences read; and the events that tell of it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.domain.claims import Claim, Verdict
from app.domain.frozen import Frozen
from app.domain.spec_base import Integer, Name, Reference, Spec, build_disagreement
from app.domain.trajectories import ActionName

MAX_STEPS = 10


class PredictRequest(Spec):
    """What is to be judged, and by what. `adapter` left out: the promoted one, else the base; `null`: the base.

    `store` keeps the answer, under a unique `name` too where one is given. In mode `ungrounded` the model writes all
    steps alone and at once, Observations too: `corpus`, `max_steps` and `samples` are refused, and a stream has the
    prediction only.
    """

    claim: Claim
    adapter: Reference | None = None
    base_model: Reference | None = None
    corpus: Reference | None = None
    mode: Literal["grounded", "ungrounded"] = "grounded"
    stream: bool = False
    max_steps: Annotated[Integer, Field(ge=1, le=MAX_STEPS)] = 7
    samples: Annotated[Integer, Field(ge=1, le=16)] = 1
    store: bool = False
    name: Name | None = None

    @model_validator(mode="after")
    def _only_what_is_kept_has_a_name(self) -> Self:
        if self.name is not None and not self.store:
            message = "only a prediction that is stored has a name; add store: true, or leave name out"
            raise build_disagreement(message, "name", code="name_without_store")
        return self

    @model_validator(mode="after")
    def _alone_it_searches_nothing_and_speaks_once(self) -> Self:
        idle = [name for name in ("corpus", "max_steps", "samples") if name in self.model_fields_set]
        if self.mode == "ungrounded" and idle:
            raise build_disagreement(f"{', '.join(idle)} without effect in mode ungrounded; leave it out", idle[0])
        return self


class PredictedAction(Frozen):
    """What the model chose to do. `argument` is as it wrote it; in ungrounded mode the name may be no known one."""

    name: ActionName | str
    argument: str


class ObservedText(Frozen):
    """What the model was shown. `source`: a corpus, the server (a correction), or the model itself."""

    text: str
    page: str | None = None
    sentences: tuple[int, ...] = ()
    source: Literal["corpus", "memory", "server", "model"]
    corpus: str | None = None
    snapshot: str | None = None
    trimmed: bool = False


class PredictedStep(Frozen):
    thought: str
    action: PredictedAction | None
    observation: ObservedText | None


class CitedSentence(Frozen):
    page: str
    sentence_id: int
    text: str
    url: str | None = None


class PredictionUsage(Frozen):
    """Tokens over all calls. `crossed_stops`: tokens replaced because they held a stop and something more."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    crossed_stops: int = 0


class Timings(Frozen):
    """Seconds; `scoring`: those in which the three verdicts were weighed, beside what was generated."""

    total: float
    generation: float
    scoring: float = 0.0
    search: float


class Prediction(Frozen):
    """A claim's verdict and how it came about.

    `verdict`: what the trajectory finished with; `confidence`: its probability; `agrees`: no other verdict has more.
    `grounded`: every Observation came from a corpus or the server. `forced`: the server ended the trajectory.
    `abstained`: NOT ENOUGH INFO without having read any page. `text`: the trajectory in the user's own notation.
    """

    id: str
    object: Literal["prediction"] = "prediction"
    name: str | None
    claim: str
    verdict: Verdict
    confidence: float
    probabilities: dict[Verdict, float]
    probability_method: Literal["verdict_branch", "vote"]
    agrees: bool
    grounded: bool
    forced: bool
    abstained: bool
    steps: tuple[PredictedStep, ...]
    evidence: tuple[CitedSentence, ...]
    text: str
    adapter: str | None
    base_model: str
    corpus: str | None
    usage: PredictionUsage
    timings: Timings


class ThoughtWritten(Frozen):
    event: Literal["thought"] = "thought"
    step: int
    thought: str


class ActionChosen(Frozen):
    event: Literal["action"] = "action"
    step: int
    action: PredictedAction


class Observed(Frozen):
    event: Literal["observation"] = "observation"
    step: int
    observation: ObservedText


class Predicted(Frozen):
    """The last event of a prediction that went well."""

    event: Literal["prediction"] = "prediction"
    prediction: Prediction


PredictionEvent = ThoughtWritten | ActionChosen | Observed | Predicted
