"""Jobs that make a dataset from another one: trajectories from labelled claims, or new Observations for old Actions."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from app.domain.claims import Verdict
from app.domain.frozen import Frozen
from app.domain.spec_base import Count, Fraction, Integer, Metadata, Name, Reference, Spec
from app.domain.splits import SplitName

REASONS: dict[str, str] = {
    "page_not_named": "the row names no page, and no words of its claim open one",
    "page_missing": "the corpus has no such page",
    "evidence_missing": "the page has no sentence of that number",
    "evidence_elsewhere": "the evidence is on other pages than the row's page",
    "evidence_unreachable": "the evidence is not among the first sentences, and no word of the claim leads to it",
    "label_doubted": "the page contradicts the label by a year",
    "unwritable": "a title, a claim or a sentence cannot be written in a step: it is too long, or has brackets",
    "duplicate": "the same trajectory was made of an earlier row",
    "nothing_found": "no Search of the row opens a page of the corpus",
    "quotation_lost": "a Thought quotes a text that the new Observations do not contain",
}
"""Why a row was left out, by code."""

REFUSALS_SHOWN = 200


class SynthesisSpec(Spec):
    """Makes trajectories from a dataset's claims by running Search and Lookup on a corpus. No model takes part.

    `output`: name of the new dataset. `split`: shares of train, validation and test; all claims of a page are in one
    part. Rows that name their part keep it. `max_claims`: only the first ones. `contrasts`: share of the rows beside
    which a trajectory of a changed claim is made, which the same page decides the other way.
    """

    kind: Literal["synthesize"] = "synthesize"
    name: Name | None = None
    dataset: Reference
    corpus: Reference | None = None
    output: Name | None = None
    split: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    max_claims: Count | None = None
    contrasts: Fraction = 0.0
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 42
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shares_are_a_whole(self) -> Self:
        if not math.isclose(sum(self.split), 1.0, abs_tol=1e-6):
            raise ValueError("the three shares of split must sum to 1")
        return self


class RegroundOptions(Spec):
    """How a dataset is regrounded. `output`: name of the new dataset."""

    name: Name | None = None
    corpus: Reference | None = None
    output: Name | None = None
    metadata: Metadata = Field(default_factory=dict)


class RegroundSpec(RegroundOptions):
    """Replays every Action of a dataset on a corpus, and replaces the Observations by what it answers."""

    kind: Literal["reground"] = "reground"
    dataset: Reference


class SynthesisPlan(Frozen):
    """What the job does, resolved when it is submitted: ids, and the corpus's snapshot."""

    kind: Literal["synthesize", "reground"]
    dataset: str
    corpus: str
    snapshot: str
    rows: int


class SynthesisProgress(Frozen):
    """`rows_made` of the `rows_read` of `rows_total`. `dataset`: id of the new dataset, once it is stored."""

    rows_read: int = 0
    rows_total: int
    rows_made: int = 0
    dataset: str | None = None


class Refusal(Frozen):
    """A row that was left out. `row`: its number in the dataset, from 1."""

    row: int
    claim: str
    code: str
    message: str


class ActionCounts(Frozen):
    """What the corpus answered: to the Actions of the rows made, or, in a `reground`, of all rows.

    `searches_found`: opened a page. `lookups_found`: showed a sentence.
    """

    searches: int = 0
    searches_found: int = 0
    lookups: int = 0
    lookups_found: int = 0


class SynthesisReport(Frozen):
    """The report of the job: `report.json` among its artifacts.

    `refused`: rows by reason. `refusals`: the first of them. `steps`: trajectories by number of steps. `thoughts`:
    wordings of Thoughts, without what fills them; `commonest_thought` is the share of the most frequent one.
    `contrasts`: how many of the rows made are of changed claims.
    """

    job: str
    name: str
    kind: Literal["synthesize", "reground"]
    source: str
    dataset: str | None
    corpus: str
    snapshot: str
    rows_read: int
    rows_made: int
    contrasts: int = 0
    refused: dict[str, int]
    refusals: tuple[Refusal, ...]
    labels: dict[Verdict, int]
    steps: dict[int, int]
    splits: dict[SplitName, int]
    actions: ActionCounts
    thoughts: int | None = None
    commonest_thought: float | None = None


def synthesis_examples() -> dict[str, Any]:
    """Examples for the documentation. They run after `veritune demo`."""
    return {
        "the least": {"dataset": "demo"},
        "named": {"dataset": "demo", "output": "demo-synthesised", "split": [0.8, 0.2, 0.0], "contrasts": 0.5},
    }
