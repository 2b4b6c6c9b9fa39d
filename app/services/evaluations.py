"""Evaluations: submit one, and judge its claims for the attempt that runs it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from app.db import Database
from app.db.tables import EvaluationAnswerRow
from app.domain.calibration import LEAST_CLAIMS, fit_calibration
from app.domain.errors import InvalidError, Problem
from app.domain.evaluation_report import build_baselines, build_run_report, compare
from app.domain.evaluations import (
    ControlName,
    EvaluationPlan,
    EvaluationProgress,
    EvaluationReport,
    EvaluationRun,
    EvaluationSpec,
    GoldClaim,
)
from app.domain.jobs import Lease
from app.domain.predictions import Prediction, PredictRequest
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge import KnowledgeSource
from app.knowledge.base import SENTENCES_SHOWN
from app.knowledge.controls import EmptySource, ShuffledSource
from app.queue import Doorbell
from app.services.adapters import Adapters
from app.services.base_models import BaseModels
from app.services.corpora import Corpora
from app.services.datasets import Datasets
from app.services.naming import check_name
from app.services.predictions import Predictions
from app.services.prompt_session import IsCancelled
from app.services.submission import queue_job

MAX_ANSWERS = 20_000
"""Claims times runs of one evaluation. Its answers are in memory while it runs: about 20 KB each."""


@dataclass(frozen=True, slots=True)
class PreparedEvaluation:
    """An evaluation job with what it judges.

    `sources`: what is searched, by control. `answers`: run key → index of the claim → its answer, as far as judged.
    """

    spec: EvaluationSpec
    plan: EvaluationPlan
    gold: list[GoldClaim]
    sources: dict[ControlName | None, KnowledgeSource]
    answers: dict[str, dict[int, Prediction]]

    def remaining(self) -> Iterator[tuple[EvaluationRun, int]]:
        """What is still to be judged, run by run."""
        for run in self.plan.runs:
            for index in range(len(self.gold)):
                if index not in self.answers[run.key]:
                    yield run, index

    def in_order(self) -> dict[str, Sequence[Prediction]]:
        """Run key → its answers in the order of the claims. Only once all are judged."""
        return {run.key: [self.answers[run.key][i] for i in range(len(self.gold))] for run in self.plan.runs}


class Evaluations:
    def __init__(
        self,
        database: Database,
        datasets: Datasets,
        corpora: Corpora,
        adapters: Adapters,
        base_models: BaseModels,
        predictions: Predictions,
        doorbell: Doorbell,
    ) -> None:
        self._database = database
        self._datasets = datasets
        self._corpora = corpora
        self._adapters = adapters
        self._base_models = base_models
        self._predictions = predictions
        self._doorbell = doorbell

    def submit(self, spec: EvaluationSpec) -> str:
        """Queue an evaluation and return the job's id. The doorbell rings after the row is committed.

        Raises NotFoundError and InvalidError if something that it names is not there.
        """
        check_name(spec.name)
        plan = self._plan(spec)
        progress = EvaluationProgress(total=plan.claims * len(plan.runs))
        details = {"claims": plan.claims, "runs": len(plan.runs)}
        base = plan.runs[0].base_model
        return queue_job(self._database, self._doorbell, self._datasets, spec, plan, progress, details, base)

    def _plan(self, spec: EvaluationSpec) -> EvaluationPlan:
        dataset = self._datasets.get(spec.dataset)
        corpus, source = self._corpora.open(spec.corpus)
        claims = dataset.rows if spec.split is None else sum(1 for _ in self._rows(spec))
        _refuse_without_effect(spec)
        if spec.fit_calibration and min(claims, spec.max_claims or claims) < LEAST_CLAIMS:
            message = f"a calibration is fitted to at least {LEAST_CLAIMS} claims; there are fewer"
            raise InvalidError(message, code="too_few_claims", problems=(Problem(("fit_calibration",), message),))
        if claims == 0:
            message = f"{dataset.name} has no claim in the split {spec.split}"
            raise InvalidError(message, code="no_claims", problems=(Problem(("split",), message),))
        claims = min(claims, spec.max_claims or claims)
        runs = self._runs(spec)
        if claims * len(runs) > MAX_ANSWERS:
            message = (
                f"{claims:,} claims judged {len(runs)} times are more than {MAX_ANSWERS:,} answers; set max_claims"
            )
            raise InvalidError(message, code="too_many_claims", problems=(Problem(("max_claims",), message),))
        return EvaluationPlan(
            dataset=dataset.id,
            corpus=corpus,
            snapshot=source.snapshot,
            claims=claims,
            runs=tuple(runs),
        )

    def _runs(self, spec: EvaluationSpec) -> list[EvaluationRun]:
        """Bases first, then adapters, then the controls of each adapter; of a base, if there is no adapter."""
        adapters = [self._adapters.get(reference) for reference in spec.adapters]
        bases_of = {one.id: self._base_models.by_digest(one.manifest.base.digest).name for one in adapters}
        tuned = [
            EvaluationRun(
                adapter=one.id,
                base_model=bases_of[one.id],
                name=one.name,
                calibration=None if spec.fit_calibration else one.calibration,
            )
            for one in adapters
        ]
        names = [spec.base_model] if spec.base_model or not adapters else list(dict.fromkeys(bases_of.values()))
        bases = [self._base_models.get(name).name for name in names]
        plain = [EvaluationRun(adapter=None, base_model=name, name=name) for name in bases]
        if not spec.include_base and tuned:
            plain = []
        runs = {run.key: run for run in (*plain, *tuned)}
        for run in tuned or plain:
            for control in spec.controls:
                controlled = run.model_copy(
                    update={"control": control, "name": f"{run.name}, {control.replace('_', ' ')}"}
                )
                runs[controlled.key] = controlled
        return list(runs.values())

    def _rows(self, spec: EvaluationSpec) -> Iterator[Trajectory]:
        rows = self._datasets.stream(spec.dataset)
        return (row for row in rows if spec.split is None or row.split is spec.split)

    def _gold(self, spec: EvaluationSpec, source: KnowledgeSource) -> list[GoldClaim]:
        return [_to_gold(row, source) for row in islice(self._rows(spec), spec.max_claims)]

    # For attempts.

    def prepare(self, job_id: str, spec: EvaluationSpec) -> PreparedEvaluation:
        """Resolve everything again, for an attempt. Raises NotFoundError if an adapter or the corpus was deleted."""
        with self._database.read() as unit:
            row = unit.jobs.find(job_id)
            assert row is not None, "a leased job is not deleted"
            plan = EvaluationPlan.model_validate(row.plan)
            stored = unit.evaluation_answers.list_answers(job_id)
        answers: dict[str, dict[int, Prediction]] = defaultdict(dict)
        for answer in stored:
            answers[answer.run][answer.claim] = Prediction.model_validate(answer.answer)
        _, source = self._corpora.open(plan.corpus)
        gold = self._gold(spec, source)
        titles = [claim.page for claim in gold if claim.page is not None]
        sources: dict[ControlName | None, KnowledgeSource] = {
            None: source,
            "claim_only": EmptySource(source),
            "shuffled_pages": ShuffledSource(source, titles, spec.seed),
        }
        prepared = PreparedEvaluation(spec, plan, gold, sources, answers)
        for adapter in {run.adapter for run, _ in prepared.remaining() if run.adapter is not None}:
            self._adapters.get(adapter)
        return prepared

    def judge(
        self, prepared: PreparedEvaluation, run: EvaluationRun, index: int, is_cancelled: IsCancelled
    ) -> Prediction:
        """Judge one claim, as `/predict` would, or under the run's control."""
        request = PredictRequest(
            claim=prepared.gold[index].claim,
            adapter=run.adapter,
            base_model=None if run.adapter else run.base_model,
            corpus=prepared.plan.corpus,
            max_steps=prepared.spec.max_steps,
        )
        return self._predictions.predict_from(request, prepared.sources[run.control], run.calibration, is_cancelled)

    def record(self, lease: Lease, run: str, answers: dict[int, Prediction], progress: EvaluationProgress) -> None:
        """Write a batch of answers of the run with this key, and the job's progress. It ends a series of strikes."""
        with self._database.write() as unit:
            unit.jobs.write(lease, strikes=0, progress=progress.model_dump(mode="json"))
            for index, answer in answers.items():
                document = answer.model_dump(mode="json")
                unit.evaluation_answers.put(
                    EvaluationAnswerRow(job_id=lease.job_id, run=run, claim=index, answer=document)
                )

    def calibrate(self, lease: Lease, prepared: PreparedEvaluation) -> None:
        """Fit each adapter's probabilities to all labels, and apply that from now on. Deleted ones are left out."""
        labels = [claim.label for claim in prepared.gold]
        tuned = [run for run in prepared.plan.runs if run.adapter is not None and run.control is None]
        for run in tuned if prepared.spec.fit_calibration else ():
            rows = [answer.probabilities for answer in prepared.in_order()[run.key]]
            fitted = fit_calibration(rows, labels)
            with self._database.write() as unit:
                unit.jobs.write(lease, owner=lease.owner)
                if row := unit.adapters.find(str(run.adapter)):
                    row.calibration = fitted.model_dump(mode="json")
                else:
                    message = f"{run.name} was deleted; its calibration is not kept"
                    unit.jobs.add_event(lease.job_id, "warning", message, "warning", {})


def build_report(job_id: str, name: str, prepared: PreparedEvaluation) -> EvaluationReport:
    """The report of an evaluation whose claims are all judged."""
    gold, seed = prepared.gold, prepared.spec.seed
    answers = prepared.in_order()
    fit = prepared.spec.fit_calibration
    reports = [
        build_run_report(run, gold, answers[run.key], seed, fit=fit and run.adapter is not None)
        for run in prepared.plan.runs
    ]
    plain = [report for report in reports if report.run.control is None]
    pairs = [(first, second) for number, first in enumerate(plain) for second in plain[number + 1 :]]
    pairs += [
        (report, next(one for one in plain if one.run.adapter == report.run.adapter))
        for report in reports
        if report.run.control is not None
    ]
    return EvaluationReport(
        job=job_id,
        name=name,
        dataset=prepared.plan.dataset,
        corpus=prepared.plan.corpus,
        snapshot=prepared.plan.snapshot,
        claims=len(gold),
        labels={label: sum(claim.label is label for claim in gold) for label in type(gold[0].label)},
        baselines=build_baselines(gold, seed),
        runs=tuple(reports),
        comparisons=tuple(
            compare(first, second, gold, (answers[first.run.key], answers[second.run.key]), seed)
            for first, second in pairs
        ),
    )


def _refuse_without_effect(spec: EvaluationSpec) -> None:
    """Raise InvalidError for keys that would do nothing."""
    found = []
    if spec.fit_calibration and not spec.adapters:
        found.append(Problem(("fit_calibration",), "a calibration belongs to an adapter; name one in adapters"))
    if not spec.include_base and not spec.adapters:
        found.append(Problem(("include_base",), "without adapters only the base is judged; leave it out"))
    if not spec.include_base and spec.base_model is not None:
        found.append(Problem(("include_base",), "base_model is judged only with include_base; leave one of them out"))
    if found:
        raise InvalidError(found[0].message, code="without_effect", problems=tuple(found))


def _to_gold(row: Trajectory, source: KnowledgeSource) -> GoldClaim:
    """The page: the row's own; else of the evidence; else the one that the last Search of the trajectory opens."""
    searched = [step.action.argument for step in row.steps if step.action.name is ActionName.SEARCH]
    titles = {
        name: page.title
        for name in (*{one.page for one in row.evidence}, *searched[-1:], *([row.page] if row.page else []))
        if (page := source.search(name).page)
    }
    evidence = tuple((titles.get(one.page, one.page), one.sentence) for one in row.evidence)
    own = [titles.get(row.page, row.page)] if row.page else []
    pages = own or [page for page, _ in evidence] or [titles[name] for name in searched[-1:] if name in titles]
    observed = [step.observation for step in row.steps if step.observation]
    if not observed and pages and (opened := source.search(pages[0]).page):
        observed = list(opened.sentences[:SENTENCES_SHOWN])
    return GoldClaim(
        claim=row.claim,
        label=row.verdict,
        page=pages[0] if pages else None,
        evidence=evidence,
        read=" ".join(observed),
    )
