"""Syntheses: jobs that make a dataset from another one and a corpus. Submit them, and do their rows for an attempt."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from app.db import Database
from app.domain.contrasts import ContrastBuilder
from app.domain.corpora import Observation
from app.domain.datasets import canonical_line
from app.domain.errors import ConflictError, InvalidError, NotFoundError, Problem
from app.domain.jobs import Lease
from app.domain.quotations import find_quotations
from app.domain.splits import draw_split, draw_uniform
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
from app.domain.thoughts import build_skeleton
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge import KnowledgeSource
from app.knowledge.episodes import Episode, LabelledClaim, RowRefused
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
    """What became of the rows so far. `made`: number of trajectories, of which `contrasts` are of changed claims."""

    read: int = 0
    made: int = 0
    contrasts: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refusals: list[Refusal] = field(default_factory=list)
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
        if spec.output is not None and self._datasets.exists(spec.output):
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
        """For each row of the dataset, the canonical line of its trajectory, or None if it is left out.

        The line of its contrast follows, if it has one.
        """
        spec = prepared.spec
        builder = ContrastBuilder(spec.seed) if isinstance(spec, SynthesisSpec) and spec.contrasts else None
        for row in islice(self._datasets.stream(prepared.spec.dataset), prepared.plan.rows):
            tally.read += 1
            try:
                made = _make(row, prepared, tally)
            except RowRefused as refused:
                _note_refusal(tally, row, refused)
                yield None
                continue
            tally.made += 1
            yield canonical_line(made)
            if builder is not None and (contrast := _make_contrast(builder, made, prepared, tally)) is not None:
                tally.made += 1
                tally.contrasts += 1
                yield canonical_line(contrast)

    def record(self, lease: Lease, prepared: PreparedSynthesis, tally: Tally, dataset: Dataset | None = None) -> None:
        """Write the job's progress. It ends a series of strikes."""
        progress = SynthesisProgress(
            rows_read=tally.read,
            rows_total=prepared.plan.rows,
            rows_made=dataset.rows if dataset else tally.made,
            dataset=dataset.id if dataset else None,
        )
        with self._database.write() as unit:
            unit.jobs.write(lease, strikes=0, progress=progress.model_dump(mode="json"))

    def store(self, name: str, prepared: PreparedSynthesis, rows: Path) -> tuple[Dataset, bool]:
        """(the dataset made of a file of canonical lines, whether it is new). A repeated attempt finds its own."""
        filename = f"{prepared.spec.output or name}.jsonl"
        return self._datasets.create(rows, filename, "application/jsonl", prepared.spec.output, {})

    def discard(self, dataset: Dataset) -> None:
        """Delete a dataset that a stopped attempt has just made, unless another job uses it already."""
        with suppress(ConflictError, NotFoundError):
            self._datasets.delete(dataset.id)


def _make(row: Trajectory, prepared: PreparedSynthesis, tally: Tally) -> Trajectory:
    spec, source = prepared.spec, prepared.source
    if isinstance(spec, RegroundSpec):
        observed = replay(row, source)
        _note_actions(tally, row, observed)
        return reground(row, observed)
    made = _play(LabelledClaim(row.claim, row.verdict, row.page, row.evidence), source, spec.seed, tally)
    part = row.split or draw_split(draw_uniform(f"{spec.seed}:{made.page}"), spec.split)
    return made.model_copy(update={"split": part})


def _make_contrast(
    builder: ContrastBuilder, made: Trajectory, prepared: PreparedSynthesis, tally: Tally
) -> Trajectory | None:
    """A trajectory of the claim's contrast, on the same page and in the same part. None for most claims."""
    spec = prepared.spec
    assert isinstance(spec, SynthesisSpec)
    observations = [step.observation for step in made.steps if step.observation]
    quoted = "".join(find_quotations(made.steps[-1].thought, observations)[:1])
    found = builder.build(made.claim, made.verdict, made.page or "", quoted, " ".join(observations))
    if found is None or draw_uniform(f"{spec.seed}:{made.claim}:contrast") >= spec.contrasts:
        return None
    row = LabelledClaim(found.claim, found.label, made.page, made.evidence)
    with suppress(RowRefused):
        return _play(row, prepared.source, spec.seed, tally).model_copy(update={"split": made.split})
    return None


def _play(row: LabelledClaim, source: KnowledgeSource, seed: int, tally: Tally) -> Trajectory:
    try:
        made = Episode(source, row, seed).play()
    except ValidationError as error:
        raise RowRefused("unwritable", str(error.errors(include_url=False)[0]["msg"])) from None
    _note_actions(tally, made, replay(made, source))
    for step in made.steps:
        tally.thoughts[build_skeleton(step.thought, step.action.argument, made.claim)] += 1
    return made


def _note_refusal(tally: Tally, row: Trajectory, refused: RowRefused) -> None:
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


def build_synthesis_report(
    job_id: str, name: str, prepared: PreparedSynthesis, tally: Tally, dataset: Dataset | None
) -> SynthesisReport:
    """`dataset`: the one that was made; its counts are those of the report, because storing drops duplicates."""
    refused = dict(tally.refused.most_common())
    if dataset is not None and (repeated := tally.made - dataset.rows):
        refused["duplicate"] = repeated
    total = tally.thoughts.total()
    return SynthesisReport(
        job=job_id,
        name=name,
        kind=prepared.plan.kind,
        source=prepared.plan.dataset,
        dataset=dataset.id if dataset else None,
        corpus=prepared.plan.corpus,
        snapshot=prepared.plan.snapshot,
        rows_read=tally.read,
        rows_made=dataset.rows if dataset else 0,
        contrasts=tally.contrasts,
        refused=refused,
        refusals=tuple(tally.refusals),
        labels=dataset.report.labels if dataset else {},
        steps=dataset.report.steps if dataset else {},
        splits=dataset.report.splits if dataset else {},
        actions=ActionCounts(**tally.actions),
        thoughts=len(tally.thoughts) or None,
        commonest_thought=round(max(tally.thoughts.values()) / total, 4) if total else None,
    )
