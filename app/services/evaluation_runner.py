"""Runs evaluations for workers: judges claims, records the answers, calibrates and promotes, builds the report."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from app.db import Database
from app.db.tables import EvaluationAnswerRow
from app.domain.calibration import fit_calibration
from app.domain.evaluation_report import build_baselines, build_run_report, compare, decide_gate
from app.domain.evaluations import (
    ControlName,
    EvaluationPlan,
    EvaluationProgress,
    EvaluationReport,
    EvaluationRun,
    EvaluationSpec,
    GoldClaim,
)
from app.domain.jobs import JobStatus, Lease
from app.domain.predictions import Prediction, PredictRequest
from app.domain.trajectories import ActionName, Trajectory
from app.knowledge import KnowledgeSource
from app.knowledge.base import SENTENCES_SHOWN
from app.knowledge.controls import EmptySource, ShuffledSource
from app.services.adapters import DEFAULT, RESOURCE, Adapters
from app.services.corpora import Corpora
from app.services.evaluations import Evaluations
from app.services.predictions import Predictions
from app.services.prompt_session import IsCancelled


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


class EvaluationRunner:
    def __init__(
        self,
        database: Database,
        evaluations: Evaluations,
        corpora: Corpora,
        adapters: Adapters,
        predictions: Predictions,
    ) -> None:
        self._database = database
        self._evaluations = evaluations
        self._corpora = corpora
        self._adapters = adapters
        self._predictions = predictions

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
        asked = {"claim": prepared.gold[index].claim, "adapter": run.adapter}
        if run.adapter is None:
            asked["base_model"] = run.base_model
        if run.control == "ungrounded":
            request = PredictRequest.model_validate({**asked, "mode": "ungrounded"})
        else:
            limits = {"corpus": prepared.plan.corpus, "max_steps": prepared.spec.max_steps}
            request = PredictRequest.model_validate({**asked, **limits})
        source = prepared.sources.get(run.control, prepared.sources[None])
        return self._predictions.predict_from(request, source, run.calibration, is_cancelled)

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
        for run in prepared.plan.own_runs if prepared.spec.fit_calibration else ():
            rows = [answer.probabilities for answer in prepared.in_order()[run.key]]
            fitted = fit_calibration(rows, labels)
            with self._database.write() as unit:
                unit.jobs.write(lease, owner=lease.owner)
                if row := unit.adapters.find(str(run.adapter)):
                    row.calibration = fitted.model_dump(mode="json")
                else:
                    message = f"{run.name} was deleted; its calibration is not kept"
                    unit.jobs.add_event(lease.job_id, "warning", message, "warning", {})

    def promote(self, lease: Lease, prepared: PreparedEvaluation, report: EvaluationReport) -> None:
        """Make the adapter the default one if it passed the gate.

        Not if it was deleted, if another adapter became the default one meanwhile, or if the job is cancelled.
        """
        if report.gate is None or prepared.plan.gate is None:
            return
        beaten, run = (next(run for run in prepared.plan.runs if run.key == key) for key in prepared.plan.gate)
        found = report.gate.comparison
        by = f"{found.difference.value:+.3f} ({found.difference.low:+.3f} to {found.difference.high:+.3f})"
        figures = f"{by}, p {found.p_value:.2g}"
        with self._database.write() as unit:
            unit.jobs.write(lease, owner=lease.owner)
            default = unit.aliases.find_target(RESOURCE, DEFAULT)
            if report.gate.outcome == "inconclusive":
                kind, message = "inconclusive", f"{run.name} is kept, not promoted: {figures}"
            elif unit.adapters.find(str(run.adapter)) is None:
                kind, message = "warning", f"{run.name} was deleted; it is not promoted"
            elif default not in (beaten.adapter, run.adapter):
                kind, message = "warning", f"another adapter was promoted meanwhile; {run.name} is not: {figures}"
            elif (row := unit.jobs.find(lease.job_id)) and row.status == JobStatus.CANCELLING:
                return
            else:
                unit.aliases.point(RESOURCE, DEFAULT, str(run.adapter))
                kind, message = "promoted", f"{run.name} is the default adapter: {figures}"
            level = "warning" if kind == "warning" else "info"
            unit.jobs.add_event(lease.job_id, kind, message, level, found.model_dump(mode="json"))

    def _gold(self, spec: EvaluationSpec, source: KnowledgeSource) -> list[GoldClaim]:
        return [_to_gold(row, source) for row in islice(self._evaluations.stream_rows(spec), spec.max_claims)]


def build_report(job_id: str, name: str, prepared: PreparedEvaluation) -> EvaluationReport:
    """The report of an evaluation whose claims are all judged."""
    gold, seed = prepared.gold, prepared.spec.seed
    answers = prepared.in_order()
    fit = prepared.spec.fit_calibration
    reports = [
        build_run_report(run, gold, answers[run.key], seed, fit=fit and run in prepared.plan.own_runs)
        for run in prepared.plan.runs
    ]
    plain = [report for report in reports if report.run.control is None]
    pairs = [(first, second) for number, first in enumerate(plain) for second in plain[number + 1 :]]
    pairs += [
        (report, next(one for one in plain if one.run.adapter == report.run.adapter))
        for report in reports
        if report.run.control is not None
    ]
    comparisons = tuple(
        compare(first, second, gold, (answers[first.run.key], answers[second.run.key]), seed) for first, second in pairs
    )
    gate = next((one for one in comparisons if (one.first, one.second) == prepared.plan.gate), None)
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
        comparisons=comparisons,
        gate=None if gate is None else decide_gate(gate),
    )


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
