"""Predictions: a claim's verdict with its steps and evidence, and the events of its stream."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.domain.claims import Claim, Verdict
from app.domain.frozen import Frozen
from app.domain.spec_base import Fraction, Integer, Name, Reference, Spec, build_disagreement
from app.domain.trajectories import ActionName

MAX_STEPS = 10


class VerdictPolicy(Spec):
    """When to withhold a verdict. `abstain_below`: SUPPORTS and REFUTES need at least this probability."""

    abstain_below: Fraction = 0.0


class PredictRequest(Spec):
    """A claim to judge, and the model and corpus to use.

    `adapter`: by default the promoted adapter, else the base; `null` is the base. `store`: stores the prediction, with
    a unique `name` if one is given. In mode `ungrounded` the model writes all steps in one generation, Observations
    included. `corpus`, `max_steps` and `samples` are refused then, and a stream has only the prediction.
    `verdict_policy`: the answer is NOT ENOUGH INFO where the verdict is not probable enough.
    """

    claim: Claim
    adapter: Reference | None = None
    base_model: Reference | None = None
    corpus: Reference | None = None
    mode: Literal["grounded", "ungrounded"] = "grounded"
    stream: bool = False
    max_steps: Annotated[Integer, Field(ge=1, le=MAX_STEPS)] = 7
    samples: Annotated[Integer, Field(ge=1, le=16)] = 1
    verdict_policy: VerdictPolicy = VerdictPolicy()
    store: bool = False
    name: Name | None = None

    @model_validator(mode="after")
    def _name_needs_store(self) -> Self:
        if self.name is not None and not self.store:
            message = "only a stored prediction has a name; add store: true, or leave name out"
            raise build_disagreement(message, "name", code="name_without_store")
        return self

    @model_validator(mode="after")
    def _ungrounded_takes_no_search_options(self) -> Self:
        unused = [name for name in ("corpus", "max_steps", "samples") if name in self.model_fields_set]
        if self.mode == "ungrounded" and unused:
            message = f"{', '.join(unused)} without effect in mode ungrounded; leave it out"
            raise build_disagreement(message, unused[0])
        return self


class PredictedAction(Frozen):
    """An action of the model. `argument`: as the model wrote it. In ungrounded mode `name` may be unknown."""

    name: ActionName | str
    argument: str


class ObservedText(Frozen):
    """The observation that the model read. `source`: a corpus, the server (a correction), or the model itself."""

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


Stance = Literal["supports", "refutes", "neutral"]


class CitedSentence(Frozen):
    """A sentence of a page. `span`: its characters that the last Thought quotes, half-open.

    `sha256`: of its text in UTF-8, in hex; None in predictions that an earlier version stored.
    """

    page: str
    sentence_id: int
    text: str
    url: str | None = None
    span: tuple[int, int] | None = None
    stance: Stance = "neutral"
    sha256: str | None = None


class PredictionUsage(Frozen):
    """Tokens of all generation calls.

    `crossed_stops`: tokens that were replaced because they went past a stop string.
    """

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    crossed_stops: int = 0


class Timings(Frozen):
    """Seconds. `scoring`: time to compute the verdicts' probabilities; `generation` does not include it."""

    total: float
    generation: float
    scoring: float = 0.0
    search: float


ProbabilityMethod = Literal["verdict_branch", "verdict_branch_calibrated", "vote"]


class Prediction(Frozen):
    """A claim's verdict and how it came about.

    `verdict`: the trajectory's, or NOT ENOUGH INFO where the policy withheld that: `withheld` has it then.
    `confidence`: the probability of the trajectory's verdict, by the adapter's calibration if it has one. `agrees`: no
    other verdict is more probable. `grounded`: every Observation came from a corpus or the server. `forced`: the server
    ended the trajectory. `abstained`: NOT ENOUGH INFO, and no page was read or a verdict was withheld. `evidence`: the
    sentences that the last Thought quotes; all that were `read` if it quotes none. `quotes_verified`: it quotes
    something, and an Observation contains every quotation. `text`: the trajectory as ReAct text.
    """

    id: str
    object: Literal["prediction"] = "prediction"
    name: str | None
    claim: str
    verdict: Verdict
    withheld: Verdict | None = None
    confidence: float
    probabilities: dict[Verdict, float]
    probability_method: ProbabilityMethod
    agrees: bool
    grounded: bool
    forced: bool
    abstained: bool
    steps: tuple[PredictedStep, ...]
    evidence: tuple[CitedSentence, ...]
    quotes_verified: bool = False
    read: tuple[CitedSentence, ...] = ()
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
    """The last event of a successful prediction."""

    event: Literal["prediction"] = "prediction"
    prediction: Prediction


PredictionEvent = ThoughtWritten | ActionChosen | Observed | Predicted
