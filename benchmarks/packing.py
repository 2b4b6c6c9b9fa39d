"""Counts without training: padding, the fill of micro-batches, and the cost of larger datasets."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from app.domain.attempts import EncodedRow
from app.domain.memory import TOKEN_MULTIPLE
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from worker.training.batches import batches_of_update, pack_micro_batches, read_rows, rows_of_update

SIZES = (64, 500, 2_000, 8_000)
UPDATES_TIMED = 12
MICROSECOND = 1e6


def filling(rows: Sequence[EncodedRow], spec: TrainSpec, epochs: int = 3) -> dict[str, dict[str, float]]:
    """For both kinds of device: padding (what rounds a micro-batch up), the share of the token budget that is filled,
    the most that any packing of the same updates could fill, and how even an update's micro-batches are: their tokens
    over their number times the largest of them."""
    lengths = [len(row.all_ids) for row in rows]
    devices: tuple[Literal["cpu", "gpu"], ...] = ("cpu", "gpu")
    return {
        device: _filling(lengths, Schedule.for_spec(spec, len(rows), max(lengths), device), spec, epochs)
        for device in devices
    }


def _filling(lengths: list[int], schedule: Schedule, spec: TrainSpec, epochs: int) -> dict[str, float]:
    budget, tokens, groups, fewest, room, rounded = schedule.max_tokens, 0, 0, 0, 0, 0
    for update in range(1, epochs * schedule.updates_per_epoch + 1):
        chosen = [lengths[index] for index in rows_of_update(update, schedule, spec.seed)]
        tokens += sum(chosen)
        packed = pack_micro_batches(chosen, schedule.max_rows, budget)
        sizes = [sum(chosen[index] for index in group) for group in packed]
        groups += len(packed)
        room += len(packed) * max(sizes)
        rounded += sum(-(-size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for size in sizes)
        fewest += math.ceil(sum(chosen) / budget)
    return {
        "rows": len(lengths),
        "rows_per_update": schedule.rows_per_update,
        "token_budget": budget,
        "padding_share": round(1 - tokens / rounded, 4),
        "micro_batches": groups,
        "filled": round(tokens / (groups * budget), 4),
        "even": round(tokens / room, 4),
        "filled_at_most": round(tokens / (fewest * budget), 4),
    }


def scaling(rows: Sequence[EncodedRow], spec: TrainSpec, vocab_size: int) -> list[dict[str, float]]:
    """Microseconds per token of all work outside the model, for datasets of growing size."""
    return [_scaling(rows, spec, vocab_size, size) for size in SIZES]


def _scaling(rows: Sequence[EncodedRow], spec: TrainSpec, vocab_size: int, size: int) -> dict[str, float]:
    repeated = [rows[number % len(rows)] for number in range(size)]
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(b"".join(row.model_dump_json().encode() + b"\n" for row in repeated))
        file.flush()
        began = time.process_time()
        read = read_rows(Path(file.name), vocab_size)
        reading = time.process_time() - began
    schedule = Schedule.for_spec(spec, size, max(len(row.all_ids) for row in read), "cpu")
    paces = []
    for update in range(1, UPDATES_TIMED + 1):
        began = time.process_time()
        batches = batches_of_update(read, update, schedule, spec.seed)
        paces.append((time.process_time() - began) / sum(batch.tokens for batch in batches))
    return {
        "rows": size,
        "reading_us_per_token": round(reading / sum(len(row.all_ids) for row in read) * MICROSECOND, 4),
        "choosing_and_collating_us_per_token": round(median(paces) * MICROSECOND, 4),
    }
