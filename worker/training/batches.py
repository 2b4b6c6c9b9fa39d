"""Chooses an update's rows and packs them into micro-batches, without padding. It knows no model.

The update's number and the seed determine its rows, so a checkpoint holds no state of the data.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from app.domain.attempts import EncodedRow
from app.domain.plans import Schedule
from worker.training.errors import TrainingError
from worker.training.packing import PackedRow, position_ids


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch: its rows follow each other in one sequence.

    `predictors`: indices into `ids` of the tokens whose next token carries a loss. `targets`: the ids of those next
    tokens. `loss_weights`: weight of each target's loss. `branch_verdicts`: whether a target is the first token of a
    verdict branch's verdict.
    `row_indices`: the row in `rows` that each target belongs to. `lines`: the line of each row in the dataset.
    """

    ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    rows: tuple[PackedRow, ...]
    predictors: torch.Tensor  # [num_labelled]
    targets: torch.Tensor  # [num_labelled]
    loss_weights: torch.Tensor  # [num_labelled]
    branch_verdicts: torch.Tensor  # [num_labelled]
    row_indices: torch.Tensor  # [num_labelled]
    lines: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def labelled(self) -> int:
        return self.targets.numel()

    @property
    def total_weight(self) -> float:
        """Sum of `loss_weights`. It synchronises with their device."""
        return float(self.loss_weights.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> "MicroBatch":
        return replace(
            self,
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            loss_weights=self.loss_weights.to(device),
            branch_verdicts=self.branch_verdicts.to(device),
            row_indices=self.row_indices.to(device),
        )


def read_rows(path: Path, vocab_size: int) -> list[EncodedRow]:
    """Read the encoded rows of a work order. Raises TrainingError for a row that cannot be trained on, and names it."""
    rows: list[EncodedRow] = []
    try:
        with path.open("rb") as file:
            for line in file:
                rows.append(EncodedRow.model_validate_json(line))
                _check_row(rows[-1], vocab_size)
    except (OSError, ValidationError) as error:
        raise TrainingError(
            "bad_rows", f"the encoded rows cannot be read after the first {len(rows)}", "submit the job again"
        ) from error
    if not rows:
        raise TrainingError("no_rows", "there is no row to train on", "check the dataset and the over-length policy")
    return rows


def _check_row(row: EncodedRow, vocab_size: int) -> None:
    if any(not 0 <= token < vocab_size for token in row.all_ids):
        raise TrainingError(
            "vocabulary_mismatch",
            f"line {row.line} of the dataset has a token id outside the base model's vocabulary",
            "the tokenizer and the weights of this base model do not belong together; add it again",
        )
    if not shifted_labels(row):
        raise TrainingError(
            "no_labelled_tokens",
            f"line {row.line} of the dataset has no token that carries a loss",
            "remove the row, or raise global_max_sequence_length",
        )


class Label(NamedTuple):
    """`predictor`: index of the token that predicts `target`, the id of the token behind it."""

    predictor: int
    target: int
    verdict: bool = False
    in_branch: bool = False

    def weight(self, verdict_weight: float) -> float:
        """The weight of its loss."""
        return verdict_weight if self.verdict else 1.0


def shifted_labels(row: EncodedRow) -> list[Label]:
    """The labels of a row, its branch included: shifted by one.

    No token predicts the row's first token, so it is never a label. The trajectory's token before the branch predicts
    the branch's first token.
    """
    labels = [
        Label(index - 1, row.ids[index], index == row.verdict)
        for start, end in row.trained
        for index in range(max(start, 1), end)
    ]
    if (branch := row.branch) is None:
        return labels
    for start, end in branch.trained:
        for index in range(start, end):
            predictor = len(row.ids) + index - 1 if index else branch.at - 1
            labels.append(Label(predictor, branch.ids[index], index == branch.verdict, in_branch=True))
    return labels


def rows_of_update(update: int, schedule: Schedule, seed: int) -> list[int]:
    """Indices of the rows of update number `update`, counted from 1. An epoch's last update may have fewer rows."""
    epoch, position = divmod(update - 1, schedule.updates_per_epoch)
    first = position * schedule.rows_per_update
    return list(_shuffle_rows(schedule.rows, seed, epoch)[first : first + schedule.rows_per_update])


@lru_cache(maxsize=1)  # one shuffle an epoch: the cost of an update does not grow with the dataset
def _shuffle_rows(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def pack_micro_batches(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """Group the indices of `lengths` into micro-batches of at most `max_tokens`. A longer row has its own.

    First-fit-decreasing bin packing. A binary search then finds the smallest bound that needs no more micro-batches:
    the largest micro-batch determines an update's memory. The first one holds the longest row, so that too little
    memory shows at the start of an update.
    """
    best = _first_fit_decreasing(lengths, max_rows, max_tokens)
    low, high = max(lengths), max_tokens
    while low < high:
        bound = (low + high) // 2
        groups = _first_fit_decreasing(lengths, max_rows, bound)
        if len(groups) <= len(best):
            best, high = groups, bound
        else:
            low = bound + 1
    return best


def _first_fit_decreasing(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """Put each row, the longest first, into the first group with enough free tokens."""
    groups: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for group, free_tokens in enumerate(free):
            if lengths[index] <= free_tokens and (max_rows is None or len(groups[group]) < max_rows):
                groups[group].append(index)
                free[group] -= lengths[index]
                break
        else:
            groups.append([index])
            free.append(max_tokens - lengths[index])
    return groups


def collate(rows: Sequence[EncodedRow], verdict_weight: float = 1.0) -> MicroBatch:
    """Pack `rows` into one micro-batch. `verdict_weight`: weight of a verdict's first token; the others have 1."""
    ids: list[int] = []
    packed: list[PackedRow] = []
    labels: list[Label] = []
    row_indices: list[int] = []
    for row_index, row in enumerate(rows):
        start = len(ids)
        branch = (len(row.branch.ids), row.branch.at) if row.branch else (0, 0)
        packed.append(PackedRow(start, len(row.ids), *branch))
        own = [label._replace(predictor=start + label.predictor) for label in shifted_labels(row)]
        labels += own
        row_indices += [row_index] * len(own)
        ids += row.all_ids
    return MicroBatch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor([position for row in packed for position in position_ids(row)], dtype=torch.long),
        rows=tuple(packed),
        predictors=torch.tensor([label.predictor for label in labels], dtype=torch.long),
        targets=torch.tensor([label.target for label in labels], dtype=torch.long),
        loss_weights=torch.tensor([label.weight(verdict_weight) for label in labels], dtype=torch.float32),
        branch_verdicts=torch.tensor([label.verdict and label.in_branch for label in labels], dtype=torch.bool),
        row_indices=torch.tensor(row_indices, dtype=torch.long),
        lines=tuple(row.line for row in rows),
    )


def batches_of_update(
    rows: Sequence[EncodedRow], update: int, schedule: Schedule, seed: int, verdict_weight: float = 1.0
) -> list[MicroBatch]:
    """Collate the micro-batches of update number `update`."""
    chosen = [rows[index] for index in rows_of_update(update, schedule, seed)]
    groups = pack_micro_batches([len(row.all_ids) for row in chosen], schedule.max_rows, schedule.max_tokens)
    return [collate([chosen[index] for index in group], verdict_weight) for group in groups]
