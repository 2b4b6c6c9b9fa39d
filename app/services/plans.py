"""Plans: a config is read, its references are resolved, its rows are encoded and counted. Nothing is queued."""

from dataclasses import dataclass
from typing import Any, Literal

from app.db import Database
from app.db.tables import BaseModelRow, DatasetRow
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.plans import Plan, Schedule
from app.domain.reading import read_spec
from app.domain.specs import Feature, TrainSpec
from app.services.base_models import BaseModels
from app.services.devices import Devices
from app.services.encodings import Encodings, EncodingSummary, refuse_overlength
from app.services.splits import check_parts, check_split_column, empty_parts


@dataclass(frozen=True, slots=True)
class Prepared:
    """A spec with what it refers to. `rows` is the blob of encoded rows; `limit` the sequence length in tokens."""

    spec: TrainSpec
    dataset: DatasetRow
    base: BaseModelRow
    rows: str
    summary: EncodingSummary
    schedule: Schedule
    limit: int
    plan: Plan


class Plans:
    def __init__(
        self,
        database: Database,
        base_models: BaseModels,
        encodings: Encodings,
        devices: Devices,
        max_sequence_length: int,
    ) -> None:
        self._database = database
        self._base_models = base_models
        self._encodings = encodings
        self._devices = devices
        self._cap = max_sequence_length

    def prepare(self, data: Any) -> Prepared:
        """Everything that can be known before the job runs. Raises InvalidError with every problem's place."""
        spec = read_spec(data)
        dataset = self._dataset(spec)
        base = self._base_models.get(spec.base_model)
        limit = self._limit(spec, base)
        rows, summary = self._encodings.of(
            dataset, spec, base.tokenizer, limit, lambda: self._base_models.encoder(base, spec.format())
        )
        refuse_overlength(summary, limit)
        check_parts(spec, summary)
        device = self._devices.trainer()
        on: Literal["cpu", "gpu"] = "gpu" if device is not None and device.type == "gpu" else "cpu"
        schedule = Schedule.of(spec, summary.trained, summary.longest, on, summary.validation)
        plan = _plan(spec, base.name, dataset.name, device.name if device else "unknown", limit, summary, schedule)
        return Prepared(spec, dataset, base, rows, summary, schedule, limit, plan)

    def _dataset(self, spec: TrainSpec) -> DatasetRow:
        with self._database.read() as unit:
            dataset = unit.datasets.find(spec.dataset)
        if dataset is None:
            raise NotFoundError(
                f"there is no dataset {spec.dataset!r}; GET /datasets lists them",
                code="unknown_dataset",
                problems=(Problem(("dataset",), "not found", "upload it with POST /datasets"),),
            )
        columns = dataset.report["columns"]
        _check_feature("input_features", spec.input_features[0], "claim", columns.get("claim"))
        _check_feature("output_features", spec.output_features[0], "trajectories", columns.get("trajectories"))
        if spec.preprocessing.split.type == "fixed":
            check_split_column(spec.preprocessing.split.column or "split", dataset)
        return dataset

    def _limit(self, spec: TrainSpec, base: BaseModelRow) -> int:
        context = self._base_models.describe(base).context_length
        asked = spec.max_sequence_length
        if asked is not None and asked > context:
            message = f"{asked} tokens are more than {base.name}'s context of {context}"
            raise InvalidError(
                f"preprocessing.global_max_sequence_length: {message}",
                code="invalid_spec",
                problems=(Problem(("preprocessing", "global_max_sequence_length"), message),),
            )
        return asked or min(context, self._cap)


def _check_feature(place: str, feature: Feature, ours: str, theirs: str | None) -> None:
    named = feature.column or feature.name
    if named not in (ours, theirs):
        known = f"{ours!r}" if theirs in (None, ours) else f"{ours!r} or {theirs!r}"
        raise InvalidError(
            f"{place}.0.name: the dataset's column is {known}, not {named!r}",
            code="invalid_spec",
            problems=(Problem((place, 0, "name"), f"not a column of the dataset: {named!r}", f"write {known}"),),
        )


def _plan(
    spec: TrainSpec,
    base: str,
    dataset: str,
    device: str,
    limit: int,
    summary: EncodingSummary,
    schedule: Schedule,
) -> Plan:
    share = summary.protected / summary.kept
    warnings = empty_parts(spec, summary)
    if summary.dropped:
        warnings.append(f"{summary.dropped} rows do not fit {limit} tokens and are dropped; see overlength")
    if share > 0.05:
        warnings.append(
            f"{share:.0%} of the rows were trimmed around a quotation, which serving cannot do; "
            "raise global_max_sequence_length"
        )
    return Plan(
        base_model=base,
        dataset=dataset,
        device=device,
        rows=summary.rows,
        rows_trained=summary.trained,
        rows_validation=summary.validation,
        rows_test=summary.test,
        rows_trimmed=summary.trimmed,
        rows_protected=summary.protected,
        rows_dropped=summary.dropped,
        protected_share=round(share, 4),
        max_sequence_length=limit,
        lengths=summary.lengths,
        tokens_per_epoch=summary.tokens,
        labelled_tokens_per_epoch=summary.labelled_tokens,
        verdict_branches=summary.branches,
        total_updates=schedule.updates,
        updates_per_epoch=schedule.updates_per_epoch,
        rows_per_update=schedule.rows_per_update,
        tokens_per_micro_batch=schedule.max_tokens,
        warmup_updates=schedule.warmup_updates,
        overlength=summary.notes,
        warnings=tuple(warnings),
    )
