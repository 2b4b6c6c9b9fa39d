"""Changes that may make a config fit its device, mildest first. The planner tests them."""

from collections.abc import Iterator
from typing import Any

from pydantic import JsonValue

from app.domain.plans import Schedule
from app.domain.specs import TrainSpec

MIN_SEQUENCE_LENGTH = 64
Change = dict[str, JsonValue]


def list_changes_by_kind(spec: TrainSpec, schedule: Schedule, longest: int, *, recompute: bool) -> list[list[Change]]:
    """Changes to try alone, grouped by kind. Each group begins with the smallest change."""
    return [
        family
        for family in (
            [] if recompute else [_checkpointing()],
            list(_batches(spec, schedule, longest)),
            list(_quantization(spec)),
            list(_lengths(spec, longest)),
        )
        if family
    ]


def list_combined_changes(spec: TrainSpec, longest: int) -> list[Change]:
    """Combined changes, each larger than the one before, to try if no change helps alone."""
    small = merge_changes(_checkpointing(), _batch(spec, 1))
    quantized = merge_changes(small, *_quantization(spec))
    return [small, quantized, *(merge_changes(quantized, length) for length in _lengths(spec, longest))]


def merge_changes(*changes: Change) -> Change:
    """One change that is all of `changes`."""
    whole: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = {**whole[key], **value} if both and isinstance(value, dict) else value
    return whole


def apply_change(spec: TrainSpec, change: Change) -> TrainSpec:
    """The spec with the change written into the user's config."""
    return TrainSpec.model_validate(merge_changes(spec.model_dump(mode="json", exclude_unset=True), change))


def _checkpointing() -> Change:
    return {"trainer": {"enable_gradient_checkpointing": True}}


def _batches(spec: TrainSpec, schedule: Schedule, longest: int) -> Iterator[Change]:
    rows = min(schedule.rows_per_update, schedule.max_rows or schedule.max_tokens // longest)
    while (rows := rows // 2) >= 1:
        yield _batch(spec, rows)


def _batch(spec: TrainSpec, rows: int) -> Change:
    """`rows` for each micro-batch, with the effective batch unchanged."""
    if spec.trainer.gradient_accumulation_steps is None:
        return {"trainer": {"batch_size": rows}}
    steps = -(-spec.trainer.effective_rows // rows)
    effective: Change = {} if spec.trainer.effective_batch_size is None else {"effective_batch_size": rows * steps}
    return {"trainer": {"batch_size": rows, "gradient_accumulation_steps": steps, **effective}}


def _quantization(spec: TrainSpec) -> Iterator[Change]:
    """Quantises to 4 bits. Full fine-tuning and IA3 need an unquantised base, so they become LoRA."""
    if spec.quantization is not None and spec.quantization.bits == 4:
        return
    plain: Change = {"quantization": {"bits": 4}}
    keeps = spec.adapter is not None and spec.adapter.type != "ia3"
    yield plain if keeps else {"adapter": {"type": "lora"}, **plain}


def _lengths(spec: TrainSpec, longest: int) -> Iterator[Change]:
    for share in (0.75, 0.5, 0.25):
        if (length := int(share * longest)) >= MIN_SEQUENCE_LENGTH:
            inner: Change = {"preprocessing": {"global_max_sequence_length": length}}
            outer: Change = {"global_max_sequence_length": length}
            yield merge_changes(inner, outer) if spec.global_max_sequence_length else inner
