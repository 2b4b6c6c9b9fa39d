"""Evaluation jobs: their spec, what they record for each claim, and the report."""

from typing import Annotated, Any, Literal

from pydantic import Field

from app.domain.calibration import Calibration
from app.domain.claims import Verdict
from app.domain.frozen import Frozen
from app.domain.predictions import MAX_STEPS
from app.domain.spec_base import Count, Integer, Metadata, Name, Reference, Spec
from app.domain.splits import SplitName

MAX_ADAPTERS = 16


ControlName = Literal["claim_only", "shuffled_pages", "ungrounded"]
CONTROLS: tuple[ControlName, ...] = ("claim_only", "shuffled_pages")


class EvaluationOptions(Spec):
    """How an evaluation judges. Only `dataset` is required.

    `split`: only the claims of this split. `max_claims`: only the first ones. `controls`: `claim_only` repeats each
    adapter's run with empty pages, `shuffled_pages` with other pages than those that were asked for, and
    `ungrounded` with a model that writes all steps alone, Observations too, without the grammar.
    `fit_calibration`: fits the probabilities of each adapter to the labels and applies that to its predictions from now
    on; give it claims that were not trained. `promote`: makes the adapter the default one if it is significantly better
    than the present default adapter, or than its base if there is none.
    """

    dataset: Reference
    corpus: Reference | None = None
    split: SplitName | None = None
    max_claims: Count | None = None
    max_steps: Annotated[Integer, Field(ge=1, le=MAX_STEPS)] = 7
    controls: tuple[ControlName, ...] = CONTROLS
    fit_calibration: bool = False
    promote: bool = False
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 42


class EvaluationSpec(EvaluationOptions):
    """An evaluation job: it judges a dataset's claims with adapters and base.

    `include_base`: also judges with the base model of the adapters, or with `base_model`.
    """

    kind: Literal["evaluate"] = "evaluate"
    name: Name | None = None
    adapters: Annotated[tuple[Reference, ...], Field(max_length=MAX_ADAPTERS)] = ()
    base_model: Reference | None = None
    include_base: bool = True
    metadata: Metadata = Field(default_factory=dict)


class EvaluationRun(Frozen):
    """One pass over the claims: a model, as it serves or under a control.

    `adapter`: its id, None for the base model alone. `name`: for people. `calibration`: applied to its probabilities.
    """

    adapter: str | None
    base_model: str
    control: ControlName | None = None
    name: str
    calibration: Calibration | None = None

    @property
    def key(self) -> str:
        """Identifies the run within its job."""
        return f"{self.adapter or self.base_model}{f'/{self.control}' if self.control else ''}"


class EvaluationPlan(Frozen):
    """What an evaluation job does, resolved when it is submitted: ids, and the corpus's snapshot.

    `gate`: keys of the run to beat and of the adapter's run, if the adapter is to be promoted.
    """

    kind: Literal["evaluate"] = "evaluate"
    dataset: str
    corpus: str
    snapshot: str
    claims: int
    runs: tuple[EvaluationRun, ...]
    gate: tuple[str, str] | None = None

    @property
    def own_runs(self) -> tuple[EvaluationRun, ...]:
        """The plain runs of the adapters that the job names: not of the one to beat."""
        beaten = self.gate[0] if self.gate else None
        return tuple(run for run in self.runs if run.adapter and run.control is None and run.key != beaten)


class EvaluationProgress(Frozen):
    """`done` of `total` claims are judged, over all runs."""

    done: int = 0
    total: int
    run: str | None = None
    claims_per_second: float | None = None
    eta_seconds: float | None = None


class GoldClaim(Frozen):
    """A claim with its label. `page`: the page that it is about, as far as the dataset says; it names the cluster."""

    claim: str
    label: Verdict
    page: str | None
    evidence: tuple[tuple[str, int], ...] = ()
    read: str = ""
    """The text of the dataset's own Observations; if it has none, the first sentences of the page."""


class Share(Frozen):
    """A share of claims with its 95 % interval, clustered by page."""

    value: float
    low: float
    high: float


class CalibrationReport(Frozen):
    """How far the probabilities can be trusted.

    `reliability`: (mean confidence, accuracy, claims) of ten bins of equal mass. `coverage`: (coverage, accuracy).
    `auroc`: of confidence, for right against wrong verdicts.
    """

    ece: float
    brier: float
    auroc: float | None
    accuracy_at_half_coverage: float | None
    reliability: tuple[tuple[float, float, int], ...]
    coverage: tuple[tuple[float, float], ...]


class RunReport(Frozen):
    """The figures of one run. Shares are of the claims, unless said otherwise.

    `confusion`: label → verdict → claims. `fever_score`: the verdict is right, and where the label is not NOT ENOUGH
    INFO, all listed evidence was read (FEVER, arXiv:1803.05355). `page_found`: of claims whose page is known.
    `by_probability`: accuracy of the most probable verdict. `search_hits`: of Searches, how many opened a page.
    `calibrated`: after fitting a calibration to the claims of other pages, if one was fitted.
    `valid_actions`: of all steps, how many are Search, Lookup or Finish with an argument; always all where the grammar
    chooses them. `quotes_verified`: of SUPPORTS and REFUTES verdicts. `invented_observations`: Observations that came
    neither from the corpus nor from the server.
    """

    run: EvaluationRun
    claims: int
    correct: int
    accuracy: Share
    by_probability: float
    recall: dict[Verdict, float | None]
    macro_f1: float
    confusion: dict[Verdict, dict[Verdict, int]]
    fever_score: float
    evidence_precision: float | None
    evidence_recall: float | None
    evidence_f1: float | None
    page_found: float | None
    accuracy_on_found: float | None
    finished: float
    abstained: float
    search_hits: float | None
    valid_actions: float
    quotes_verified: float | None
    invented_observations: int
    steps: float
    completion_tokens: float
    seconds: float
    calibration: CalibrationReport
    calibrated: CalibrationReport | None = None


class Comparison(Frozen):
    """Two runs over the same claims, paired. `difference`: accuracy of `second` minus that of `first`.

    `p_value`: McNemar's exact test over the claims that only one of the two judged right.
    """

    first: str
    second: str
    difference: Share
    only_first: int
    only_second: int
    p_value: float


class Gate(Frozen):
    """Whether an adapter earned its promotion: p below 0.05, and the interval of the difference above 0."""

    comparison: Comparison
    outcome: Literal["promoted", "inconclusive"]


class Baselines(Frozen):
    """Judges that read little, on the same claims. `overlap`: a threshold rule on the share of the claim's words that
    the dataset's own Observations contain, or, without any, the page's first sentences; cross-fitted over pages. None
    if there is no such text."""

    majority: float
    overlap: Share | None


class EvaluationReport(Frozen):
    """The report of an evaluation job: `report.json` among its artifacts."""

    job: str
    name: str
    dataset: str
    corpus: str
    snapshot: str
    claims: int
    labels: dict[Verdict, int]
    baselines: Baselines
    runs: tuple[RunReport, ...]
    comparisons: tuple[Comparison, ...]
    gate: Gate | None = None


def evaluation_examples() -> dict[str, Any]:
    """Examples for the documentation. They run after `veritune demo`."""
    return {
        "an adapter and its base": {"dataset": "demo", "adapters": ["demo"], "max_claims": 12},
        "the base alone": {"dataset": "demo", "max_claims": 12, "controls": []},
    }
