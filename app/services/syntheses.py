"""Syntheses: jobs that make a dataset from another one and a corpus. Submit them, and do their rows for an attempt."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from app.db import Database
from app.domain.claims import Verdict
from app.domain.corpora import Observation
from app.domain.datasets import canonical_line
from app.domain.errors import ConflictError, InvalidError, Problem
from app.domain.jobs import Lease
from app.domain.splits import SplitName, draw_split
from app.domain.synthesis import (
    REFUSALS_SHOWN,
    ActionCounts,
    Refusal,
    RegroundSpec,
    SynthesisPlan,
    SynthesisProgress,
    SynthesisReport,
    SynthesisSpec,
)
from app.domain.thoughts import skeleton_of
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge import KnowledgeSource
from app.knowledge.episodes import Episode, EpisodeRefused, LabelledClaim
from app.knowledge.regrounding import reground, replay
from app.queue import Doorbell
from app.services.corpora import Corpora
from app.services.datasets import Dataset, Datasets
from app.services.naming import check_name
from app.services.submission import build_job_row, queue_job

AnySynthesis = SynthesisSpec | RegroundSpec


@dataclass(frozen=True, slots=True)
class PreparedSynthesis:
    """A job with what it reads."""

    spec: AnySynthesis
    plan: SynthesisPlan
    source: KnowledgeSource


@dataclass(slots=True)
class Tally:
    """What became of the rows so far. `made`: number of trajectories."""

    read: int = 0
    made: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refusals: list[Refusal] = field(default_factory=list)
    labels: Counter[Verdict] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    splits: Counter[SplitName] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    thoughts: Counter[str] = field(default_factory=Counter)


class Syntheses:
    def __init__(self, database: Database, datasets: Datasets, corpora: Corpora, doorbell: Doorbell) -> None:
        self._database = database
        self._datasets = datasets
        self._corpora = corpora
        self._doorbell = doorbell

    def submit(self, spec: AnySynthesis) -> str:
        """Queue the job and return its id.

        Raises NotFoundError and InvalidError if something that it names is not there, and ConflictError if a name that
        it wants is taken.
        """
        check_name(spec.name)
        check_name(spec.output)
        dataset = self._datasets.get(spec.dataset)
        if spec.output is not None and self._datasets.has(spec.output):
            message = f"there is a dataset named {spec.output!r} already; choose another name"
            raise ConflictError(message, code="name_taken", problems=(Problem(("output",), message),))
        if isinstance(spec, RegroundSpec) and not dataset.report.actions.get(ActionName.SEARCH.value):
            message = f"{dataset.name} has no Search that could be replayed"
            raise InvalidError(message, code="nothing_to_replay", problems=(Problem(("dataset",), message),))
        plan = self.prepare(spec).plan
        progress = SynthesisProgress(rows_total=plan.rows)
        row = build_job_row(spec, plan, progress)
        return queue_job(self._database, self._doorbell, self._datasets, row, {"rows": plan.rows})

    def prepare(self, spec: AnySynthesis) -> PreparedSynthesis:
        """Resolve what the job reads. Raises NotFoundError if the dataset or the corpus is not there."""
        dataset = self._datasets.get(spec.dataset)
        corpus, source = self._corpora.open(spec.corpus)
        most = spec.max_claims if isinstance(spec, SynthesisSpec) else None
        plan = SynthesisPlan(
            kind=spec.kind,
            dataset=dataset.id,
            corpus=corpus,
            snapshot=source.snapshot,
            rows=min(dataset.rows, most or dataset.rows),
        )
        return PreparedSynthesis(spec, plan, source)

    # For attempts.

    def make_rows(self, prepared: PreparedSynthesis, tally: Tally) -> Iterator[bytes | None]:
        """For each row of the dataset, the canonical line of its trajectory, or None if it is left out."""
        for row in islice(self._datasets.stream(prepared.spec.dataset), prepared.plan.rows):
            tally.read += 1
            try:
                made = _make(row, prepared, tally)
            except EpisodeRefused as refused:
                _note_refusal(tally, row, refused)
                yield None
                continue
            _note_made(tally, made)
            yield canonical_line(made)

    def record(self, lease: Lease, prepared: PreparedSynthesis, tally: Tally, dataset: str | None = None) -> None:
        """Write the job's progress. It ends a series of strikes."""
        progress = SynthesisProgress(
            rows_read=tally.read, rows_total=prepared.plan.rows, rows_made=tally.made, dataset=dataset
        )
        with self._database.write() as unit:
            unit.jobs.write(lease, strikes=0, progress=progress.model_dump(mode="json"))

    def store(self, name: str, prepared: PreparedSynthesis, rows: Path) -> Dataset:
        """Create the dataset from a file of canonical lines. A repeated attempt finds the one that it created."""
        filename = f"{prepared.spec.output or name}.jsonl"
        return self._datasets.create(rows, filename, "application/jsonl", prepared.spec.output, {})[0]


def _make(row: Trajectory, prepared: PreparedSynthesis, tally: Tally) -> Trajectory:
    spec, source = prepared.spec, prepared.source
    if isinstance(spec, RegroundSpec):
        observed = replay(row, source)
        _note_actions(tally, row, observed)
        return reground(row, observed)
    try:
        made = Episode(source, LabelledClaim(row.claim, row.verdict, row.page, row.evidence), spec.seed).play()
    except ValidationError as error:
        raise EpisodeRefused("too_long", str(error.errors(include_url=False)[0]["msg"])) from None
    _note_actions(tally, made, replay(made, source))
    part = row.split or draw_split(_draw(f"{spec.seed}:{made.page}"), spec.split)
    return made.model_copy(update={"split": part})


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def _note_refusal(tally: Tally, row: Trajectory, refused: EpisodeRefused) -> None:
    tally.refused[refused.code] += 1
    if len(tally.refusals) < REFUSALS_SHOWN:
        tally.refusals.append(Refusal(row=tally.read, claim=row.claim, code=refused.code, message=refused.message))


def _note_actions(tally: Tally, row: Trajectory, observed: Sequence[Observation]) -> None:
    for step, found in zip(row.steps, observed, strict=False):
        search = step.action.name is ActionName.SEARCH
        tally.actions["searches" if search else "lookups"] += 1
        if search:
            tally.actions["searches_found"] += found.page is not None
        else:
            tally.actions["lookups_found"] += bool(found.sentences)


def _note_made(tally: Tally, made: Trajectory) -> None:
    tally.made += 1
    tally.labels[made.verdict] += 1
    tally.steps[len(made.steps)] += 1
    if made.split is not None:
        tally.splits[made.split] += 1
    for step in made.steps:
        tally.thoughts[skeleton_of(step.thought, step.action.argument, made.claim)] += 1


def build_synthesis_report(
    job_id: str, name: str, prepared: PreparedSynthesis, tally: Tally, dataset: str | None
) -> SynthesisReport:
    synthesised = isinstance(prepared.spec, SynthesisSpec) and bool(tally.thoughts)
    commonest = max(tally.thoughts.values()) / tally.thoughts.total() if synthesised else None
    return SynthesisReport(
        job=job_id,
        name=name,
        kind=prepared.plan.kind,
        source=prepared.plan.dataset,
        dataset=dataset,
        corpus=prepared.plan.corpus,
        snapshot=prepared.plan.snapshot,
        rows_read=tally.read,
        rows_made=tally.made,
        refused=dict(tally.refused.most_common()),
        refusals=tuple(tally.refusals),
        labels=dict(tally.labels),
        steps=dict(sorted(tally.steps.items())),
        splits=dict(tally.splits),
        actions=ActionCounts(**tally.actions),
        thoughts=len(tally.thoughts) if synthesised else None,
        commonest_thought=None if commonest is None else round(commonest, 4),
    )
