"""Evaluations: submit one, or build the one that follows a training job. `evaluation_runner` judges."""

from collections.abc import Iterator, Sequence

from app.db import Database
from app.db.tables import JobRow
from app.domain.adapters import Adapter
from app.domain.calibration import LEAST_CLAIMS, Calibration
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.evaluations import (
    EvaluationOptions,
    EvaluationPlan,
    EvaluationProgress,
    EvaluationRun,
    EvaluationSpec,
)
from app.domain.spec_parser import build_headline
from app.domain.specs import EvaluateAfter, TrainSpec
from app.domain.splits import SplitName
from app.domain.trajectories import Trajectory
from app.queue import Doorbell
from app.services.adapters import Adapters
from app.services.base_models import BaseModels
from app.services.corpora import Corpora
from app.services.datasets import Datasets
from app.services.naming import check_name
from app.services.submission import build_job_row, queue_job

MAX_ANSWERS = 20_000
"""Claims times runs of one evaluation. Its answers are in memory while it runs: about 20 KB each."""


class Evaluations:
    def __init__(
        self,
        database: Database,
        datasets: Datasets,
        corpora: Corpora,
        adapters: Adapters,
        base_models: BaseModels,
        doorbell: Doorbell,
    ) -> None:
        self._database = database
        self._datasets = datasets
        self._corpora = corpora
        self._adapters = adapters
        self._base_models = base_models
        self._doorbell = doorbell

    def submit(self, spec: EvaluationSpec) -> str:
        """Queue an evaluation and return the job's id. The doorbell rings after the row is committed.

        Raises NotFoundError and InvalidError if something that it names is not there.
        """
        check_name(spec.name)
        _refuse_without_effect(spec)
        row = self._row(spec, [self._adapters.get(reference) for reference in spec.adapters])
        return queue_job(self._database, self._doorbell, self._datasets, row, describe_evaluation(row))

    def _row(self, spec: EvaluationSpec, adapters: Sequence[Adapter]) -> JobRow:
        plan = self._plan(spec, adapters)
        progress = EvaluationProgress(total=plan.claims * len(plan.runs))
        return build_job_row(spec, plan, progress, plan.runs[0].base_model)

    def resolve_evaluate_after(self, spec: TrainSpec) -> TrainSpec:
        """The training job's spec, with the ids of what its `evaluate_after` names.

        Raises InvalidError if something of that is not there, or if the evaluation could not be run.
        """
        options = spec.trainer.evaluate_after
        if options is None:
            return spec
        try:
            corpus = self._corpora.resolve(options.corpus)
            dataset = self._datasets.get(options.dataset)
            runs = 2 + len(set(options.controls)) + (options.promote and self._adapters.default() is not None)
            _refuse_too_many(self._count_claims(options), runs)
            _refuse_trained_rows(spec, options, same=dataset.id == self._datasets.get(spec.dataset).id)
        except (NotFoundError, InvalidError) as error:
            problem = Problem(("trainer", "evaluate_after"), error.detail)
            raise InvalidError(build_headline((problem,)), code=error.code, problems=(problem,)) from None
        resolved = options.model_copy(update={"dataset": dataset.id, "corpus": corpus.id})
        trainer = spec.trainer.model_copy(update={"evaluate_after": resolved})
        return spec.model_copy(update={"trainer": trainer})

    def build_evaluation_job(self, options: EvaluateAfter, adapter: Adapter) -> JobRow:
        """The job that evaluates an adapter which is about to be published.

        Raises NotFoundError and InvalidError if something that it names was deleted.
        """
        spec = EvaluationSpec(adapters=(adapter.id,), **options.model_dump())
        return self._row(spec, [adapter])

    def _plan(self, spec: EvaluationSpec, adapters: Sequence[Adapter]) -> EvaluationPlan:
        dataset = self._datasets.get(spec.dataset)
        corpus = self._corpora.resolve(spec.corpus)
        claims = self._count_claims(spec)
        runs, gate = self._runs(spec, adapters)
        _refuse_too_many(claims, len(runs))
        return EvaluationPlan(
            dataset=dataset.id,
            corpus=corpus.id,
            snapshot=corpus.digest,
            claims=claims,
            runs=tuple(runs),
            gate=gate,
        )

    def _count_claims(self, spec: EvaluationOptions) -> int:
        """How many claims are judged. Raises InvalidError if they are too few."""
        dataset = self._datasets.get(spec.dataset)
        claims = dataset.rows if spec.split is None else sum(1 for _ in self.stream_rows(spec))
        if claims == 0:
            message = f"{dataset.name} has no claim in the split {spec.split}"
            raise InvalidError(message, code="no_claims", problems=(Problem(("split",), message),))
        claims = min(claims, spec.max_claims or claims)
        if spec.fit_calibration and claims < LEAST_CLAIMS:
            message = f"a calibration is fitted to at least {LEAST_CLAIMS} claims; there are fewer"
            raise InvalidError(message, code="too_few_claims", problems=(Problem(("fit_calibration",), message),))
        return claims

    def _runs(
        self, spec: EvaluationSpec, adapters: Sequence[Adapter]
    ) -> tuple[list[EvaluationRun], tuple[str, str] | None]:
        """(the runs; keys of the run to beat and of the adapter's, if it is to be promoted).

        Bases first, then the adapter to beat, then adapters, then the controls of each adapter; of a base, if there is
        no adapter.
        """
        tuned = [self._to_run(one, None if spec.fit_calibration else one.calibration) for one in adapters]
        bases_of = [run.base_model for run in tuned]
        names = [spec.base_model] if spec.base_model or not adapters else list(dict.fromkeys(bases_of))
        bases = [self._base_models.get(name).name for name in names]
        plain = [EvaluationRun(adapter=None, base_model=name, name=name) for name in bases]
        if not spec.include_base and tuned:
            plain = []
        incumbent = self._adapters.default() if spec.promote else None
        if incumbent is not None and incumbent.id not in {one.id for one in adapters}:
            plain.append(self._to_run(incumbent, incumbent.calibration))
        runs = {run.key: run for run in (*plain, *tuned)}
        for run in tuned or plain:
            for control in spec.controls:
                controlled = run.model_copy(
                    update={"control": control, "name": f"{run.name}, {control.replace('_', ' ')}"}
                )
                runs[controlled.key] = controlled
        return list(runs.values()), (plain[-1].key, tuned[0].key) if spec.promote else None

    def _to_run(self, adapter: Adapter, calibration: Calibration | None) -> EvaluationRun:
        base = self._base_models.by_digest(adapter.manifest.base.digest).name
        return EvaluationRun(adapter=adapter.id, base_model=base, name=adapter.name, calibration=calibration)

    def stream_rows(self, spec: EvaluationOptions) -> Iterator[Trajectory]:
        """The dataset's rows of the split."""
        rows = self._datasets.stream(spec.dataset)
        return (row for row in rows if spec.split is None or row.split is spec.split)


def describe_evaluation(row: JobRow) -> dict[str, int]:
    """What the job's first event says."""
    plan = EvaluationPlan.model_validate(row.plan)
    return {"claims": plan.claims, "runs": len(plan.runs)}


def _refuse_too_many(claims: int, runs: int) -> None:
    if claims * runs > MAX_ANSWERS:
        message = f"{claims:,} claims judged {runs} times are more than {MAX_ANSWERS:,} answers; set max_claims"
        raise InvalidError(message, code="too_many_claims", problems=(Problem(("max_claims",), message),))


def _refuse_trained_rows(spec: TrainSpec, options: EvaluateAfter, *, same: bool) -> None:
    """Raise InvalidError if the claims to judge are those that are trained. `same`: both are of one dataset."""
    held_out = spec.preprocessing.split.type == "fixed" and options.split in (SplitName.VALIDATION, SplitName.TEST)
    if same and not held_out:
        raise InvalidError(
            "the rows to judge are the rows that are trained; name another dataset, or train with a fixed split and "
            "judge its test part",
            code="trained_rows",
        )


def _refuse_without_effect(spec: EvaluationSpec) -> None:
    """Raise InvalidError for keys that would do nothing."""
    found = []
    if spec.fit_calibration and not spec.adapters:
        found.append(Problem(("fit_calibration",), "a calibration belongs to an adapter; name one in adapters"))
    if not spec.include_base and not spec.adapters:
        found.append(Problem(("include_base",), "without adapters only the base is judged; leave it out"))
    if spec.promote and len(spec.adapters) != 1:
        found.append(Problem(("promote",), "one adapter can be promoted; name exactly one in adapters"))
    if spec.promote and not spec.include_base:
        found.append(Problem(("include_base",), "an adapter is promoted by its comparison; leave include_base out"))
    if spec.promote and spec.base_model is not None:
        found.append(Problem(("base_model",), "an adapter is promoted over its own base; leave base_model out"))
    if not spec.include_base and spec.base_model is not None:
        found.append(Problem(("include_base",), "base_model is judged only with include_base; leave one of them out"))
    if found:
        raise InvalidError(found[0].message, code="without_effect", problems=tuple(found))
