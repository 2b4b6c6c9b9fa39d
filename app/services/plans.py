"""Plans: parse a config, resolve its references, encode and count its rows. Nothing is queued."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from app.db import Database
from app.db.tables import BaseModelRow, DatasetRow
from app.domain.devices import NamedDevice
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.memory import MemoryEstimate, estimate_memory
from app.domain.plans import Plan, Remedy, Schedule
from app.domain.remedies import Change, apply_change, list_changes_by_kind, list_combined_changes
from app.domain.spec_parser import read_spec
from app.domain.specs import Feature, TrainSpec
from app.domain.trainables import count_trainable_parameters
from app.services.adapters import Adapters
from app.services.base_models import BaseModels
from app.services.devices import Devices
from app.services.encoded_rows import EncodingSummary
from app.services.encodings import Encodings, refuse_overlength
from app.services.initial_adapter import pin_initial_adapter
from app.services.ledger import Ledger
from app.services.plan_warnings import list_warnings
from app.services.splits import check_parts, check_split_column
from app.services.targets import check_targets

CHECKPOINTING_FROM = 1_000_000_000
"""Parameters of the base from which `enable_gradient_checkpointing: auto` means yes if memory cannot be estimated."""

ROWS_LISTED = 100
"""Over-length rows that a plan lists by default. Every answer about a job contains its plan."""


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a job needs on a device. `memory` and `fits` are None if they cannot be estimated."""

    recompute: bool
    memory: MemoryEstimate | None = None
    fits: bool | None = None

    @property
    def bytes(self) -> int | None:
        """Peak device memory."""
        return self.memory.total if self.memory else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A spec with what it refers to. `rows` is the blob of encoded rows; `limit` the sequence length in tokens;
    `start` the digest of the adapter whose weights the training starts from."""

    spec: TrainSpec
    dataset: DatasetRow
    base: BaseModelRow
    start: str | None
    device: NamedDevice | None
    rows: str
    summary: EncodingSummary
    schedule: Schedule
    limit: int
    need: Need
    plan: Plan

    @property
    def seconds_an_update(self) -> float | None:
        """By the pace of the last job over this base on this device; None if there was none."""
        return None if self.plan.seconds is None else self.plan.seconds / self.schedule.updates

    @property
    def resident_limit(self) -> int:
        """Resident bytes between micro-batches, as planned. 0 if unknown: a GPU's plan is about the GPU's memory."""
        on_cpu = self.device is not None and self.device.type == "cpu"
        return self.need.memory.between_micro_batches if on_cpu and self.need.memory else 0

    @property
    def ordered(self) -> TrainSpec:
        """The spec for the child: the plan has replaced each `auto`."""
        decided = self.spec.trainer.model_copy(update={"enable_gradient_checkpointing": self.need.recompute})
        return self.spec.model_copy(update={"trainer": decided})


class Plans:
    def __init__(
        self,
        database: Database,
        base_models: BaseModels,
        encodings: Encodings,
        devices: Devices,
        adapters: Adapters,
        ledger: Ledger,
        max_sequence_length: int,
    ) -> None:
        self._database = database
        self._base_models = base_models
        self._encodings = encodings
        self._devices = devices
        self._adapters = adapters
        self._ledger = ledger
        self._cap = max_sequence_length

    def prepare(self, data: Any, *, worker: str | None = None, device: str | None = None) -> Prepared:
        """Plan a job before it runs. Raises InvalidError with the path of every problem.

        `worker`: the trainer that leased the job. `device`: a device or card that the user named. By default, it is the
        deployment's trainer.
        """
        spec = read_spec(data)
        dataset = self._dataset(spec)
        base = self._base_models.get(spec.base_model)
        target = self._devices.named(device) if device else self._trainer(worker)
        return self._prepare(spec, dataset, base, target)

    def with_remedies(self, prepared: Prepared) -> Prepared:
        """Add remedies if the job does not fit its device: changes that were planned again and fit."""
        if prepared.need.fits is not False:
            return prepared
        remedies = tuple(self._remedies(prepared))
        return replace(prepared, plan=prepared.plan.model_copy(update={"remedies": remedies}))

    def _trainer(self, worker: str | None) -> NamedDevice | None:
        own = self._devices.find(worker) if worker else None
        return own or self._devices.trainer()

    def _prepare(
        self, spec: TrainSpec, dataset: DatasetRow, base: BaseModelRow, device: NamedDevice | None
    ) -> Prepared:
        sizes = self._base_models.sizes(base)
        check_targets(spec, sizes)
        spec, start = pin_initial_adapter(spec, base, sizes, self._adapters)
        limit = self._limit(spec, base)
        rows, summary = self._encodings.get_or_encode(
            dataset, spec, base.tokenizer, limit, lambda: self._base_models.encoder(base, spec.format())
        )
        refuse_overlength(summary, limit)
        check_parts(spec, summary)
        on: Literal["cpu", "gpu"] = "gpu" if device is not None and device.type == "gpu" else "cpu"
        schedule = Schedule.for_spec(spec, summary.trained, summary.longest, on, summary.validation)
        need = self._need(spec, base, device, schedule, summary)
        name = device.name if device else "unknown"
        plan = _plan(spec, base.name, dataset, name, limit, summary, schedule)
        costs = self._costs(spec, base, device, schedule, summary, need)
        whole = plan.model_copy(update=costs)
        return Prepared(spec, dataset, base, start, device, rows, summary, schedule, limit, need, whole)

    def _need(
        self,
        spec: TrainSpec,
        base: BaseModelRow,
        device: NamedDevice | None,
        schedule: Schedule,
        summary: EncodingSummary,
    ) -> Need:
        """`auto` recomputes activations only if the job does not fit otherwise: it costs another forward pass."""
        described, sizes = self._base_models.describe(base), self._base_models.sizes(base)
        wanted = spec.trainer.enable_gradient_checkpointing
        if device is None or sizes is None:
            gpu = device is not None and device.type == "gpu"
            return Need(gpu and described.parameters > CHECKPOINTING_FROM if wanted == "auto" else wanted)
        labelled_share = summary.labelled_tokens / max(1, summary.tokens)
        batch, machine = schedule.get_largest_micro_batch(summary.longest, labelled_share), device.machine
        for recompute in (False, True) if wanted == "auto" else (wanted,):
            memory = estimate_memory(sizes, spec, batch, machine, recompute=recompute, stored=described.bytes)
            need = Need(recompute, memory, memory.total <= device.bytes)
            if need.fits:
                break
        return need

    def _costs(
        self,
        spec: TrainSpec,
        base: BaseModelRow,
        device: NamedDevice | None,
        schedule: Schedule,
        summary: EncodingSummary,
        need: Need,
    ) -> dict[str, Any]:
        sizes = self._base_models.sizes(base)
        served = self._base_models.served_digest(base, spec.quantization)
        pace = device.tokens_per_second.get(served) if device else None
        tokens = summary.tokens * schedule.updates / schedule.updates_per_epoch
        return {
            "device_bytes": device.bytes if device else None,
            "trainable_parameters": count_trainable_parameters(sizes, spec) if sizes else None,
            "gradient_checkpointing": need.recompute,
            "memory": need.memory,
            "fits": need.fits,
            "policy": self._ledger.policy_for(device.host, need.bytes, device.bytes) if device else None,
            "seconds": round(tokens / pace, 1) if pace else None,
        }

    def _remedies(self, prepared: Prepared) -> list[Remedy]:
        """One remedy for each kind of change that suffices alone; else the mildest combined change."""
        longest, spec = prepared.summary.longest, prepared.spec
        alone = list_changes_by_kind(spec, prepared.schedule, longest, recompute=prepared.need.recompute)
        if found := [remedy for family in alone if (remedy := self._first_that_fits(prepared, family))]:
            return found
        remedy = self._first_that_fits(prepared, list_combined_changes(spec, longest))
        return [remedy] if remedy else []

    def _first_that_fits(self, prepared: Prepared, family: list[Change]) -> Remedy | None:
        """The first change of the list with which the job fits."""
        for change in family:
            try:
                spec = apply_change(prepared.spec, change)
                again = self._prepare(spec, prepared.dataset, prepared.base, prepared.device)
            except (ValidationError, InvalidError):
                continue  # the change contradicts the rest of the config, or leaves no row
            if again.need.fits and again.need.memory:
                return Remedy(change=change, bytes=again.need.memory.total)
        return None

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


def _check_feature(section: str, feature: Feature, ours: str, theirs: str | None) -> None:
    named = feature.column or feature.name
    if named not in (ours, theirs):
        known = f"{ours!r}" if theirs in (None, ours) else f"{ours!r} or {theirs!r}"
        raise InvalidError(
            f"{section}.0.name: the dataset's column is {known}, not {named!r}",
            code="invalid_spec",
            problems=(Problem((section, 0, "name"), f"not a column of the dataset: {named!r}", f"write {known}"),),
        )


def _plan(
    spec: TrainSpec,
    base: str,
    dataset: DatasetRow,
    device: str,
    limit: int,
    summary: EncodingSummary,
    schedule: Schedule,
) -> Plan:
    return Plan(
        base_model=base,
        dataset=dataset.name,
        device=device,
        rows=summary.rows,
        rows_trained=summary.trained,
        rows_validation=summary.validation,
        rows_test=summary.test,
        rows_trimmed=summary.trimmed,
        rows_protected=summary.protected,
        rows_dropped=summary.dropped,
        protected_share=round(summary.protected_share, 4),
        max_sequence_length=limit,
        lengths=summary.lengths,
        tokens_per_epoch=summary.tokens,
        labelled_tokens_per_epoch=summary.labelled_tokens,
        verdict_branches=summary.branches,
        verdict_rows=summary.verdict_rows,
        total_updates=schedule.updates,
        updates_per_epoch=schedule.updates_per_epoch,
        rows_per_update=schedule.rows_per_update,
        tokens_per_micro_batch=schedule.max_tokens,
        warmup_updates=schedule.warmup_updates,
        overlength=summary.notes[:ROWS_LISTED],
        warnings=list_warnings(spec, summary, dataset, limit),
    )
