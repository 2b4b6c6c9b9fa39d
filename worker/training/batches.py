"""Which rows an update takes, and how they share micro-batches. Pure: it knows no model.

Where the data stands follows from the update's number and the seed, so a resumed run needs no state of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError

from app.domain.attempts import EncodedRow
from app.domain.plans import Schedule
from worker.training.errors import TrainingError
from worker.training.packing import PackedRow, positions


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows packed one behind the other.

    `ids`, `positions`: [tokens]. `predictors`: indices of the tokens whose next one carries a loss; `targets`: what
    that next one is; `owners`: the place in `rows` of the row that it belongs to. `lines`: where each row stands in
    the dataset.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    rows: tuple[PackedRow, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    lines: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def labelled(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        ids, places, predictors, targets, owners = (
            t.to(device) for t in (self.ids, self.positions, self.predictors, self.targets, self.owners)
        )
        return MicroBatch(ids, places, self.rows, predictors, targets, owners, self.lines)


def read_rows(path: Path, vocab_size: int) -> list[EncodedRow]:
    """The rows of a work order. Raises TrainingError, naming the row, for one that cannot be trained on."""
    rows: list[EncodedRow] = []
    try:
        with path.open("rb") as file:
            for line in file:
                rows.append(EncodedRow.model_validate_json(line))
                _check_row(rows[-1], vocab_size)
    except (OSError, ValidationError) as error:
        raise TrainingError(
            "bad_rows", f"the encoded rows cannot be read after {len(rows)} of them", "submit the job again"
        ) from error
    if not rows:
        raise TrainingError("no_rows", "there is no row to train on", "check the dataset and the over-length policy")
    return rows


def _check_row(row: EncodedRow, vocab_size: int) -> None:
    if any(not 0 <= token < vocab_size for token in row.all_ids):
        raise TrainingError(
            "vocabulary_mismatch",
            f"line {row.line} of the dataset has a token id that the base model does not embed",
            "the tokenizer and the weights of this base model do not belong together; add it again",
        )
    if not predictions(row):
        raise TrainingError(
            "no_labelled_tokens",
            f"line {row.line} of the dataset has no token to learn from",
            "remove the row, or raise global_max_sequence_length",
        )


def predictions(row: EncodedRow) -> list[tuple[int, int]]:
    """(place of the predicting token, the token it should predict) within a row's tokens, its branch's included.

    The first token of a row is never a label: nothing predicts it. A branch's first is predicted by the trajectory's
    token before it.
    """
    found = [(place - 1, row.ids[place]) for start, end in row.trained for place in range(max(start, 1), end)]
    if row.branch is None:
        return found
    own = row.branch
    for start, end in own.trained:
        for place in range(start, end):
            found.append((len(row.ids) + place - 1 if place else own.at - 1, own.ids[place]))
    return found


def rows_of_update(update: int, schedule: Schedule, seed: int) -> list[int]:
    """Indices of the rows of update number `update`, from 1. An epoch's last update may be smaller."""
    epoch, position = divmod(update - 1, schedule.updates_per_epoch)
    first = position * schedule.rows_per_update
    return list(_order(schedule.rows, seed, epoch)[first : first + schedule.rows_per_update])


@lru_cache(maxsize=1)  # shuffled once an epoch: an update's cost does not grow with the dataset
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def micro_batches(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """Indices grouped so that a group has at most `max_tokens`; a row that is longer stands alone.

    No more groups than first fit needs, and as even as first fit can make that many: the largest decides how much
    memory an update takes. The longest row comes first, so that too little memory shows at once.
    """
    best = _first_fit(lengths, max_rows, max_tokens)
    low, high = max(lengths), max_tokens
    while low < high:
        bound = (low + high) // 2
        found = _first_fit(lengths, max_rows, bound)
        if len(found) <= len(best):
            best, high = found, bound
        else:
            low = bound + 1
    return best


def _first_fit(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """The longest first, each into the first group that has room."""
    groups: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, room in enumerate(free):
            if lengths[index] <= room and (max_rows is None or len(groups[place]) < max_rows):
                groups[place].append(index)
                free[place] -= lengths[index]
                break
        else:
            groups.append([index])
            free.append(max_tokens - lengths[index])
    return groups


def collate(rows: Sequence[EncodedRow]) -> MicroBatch:
    """One batch of `rows`."""
    ids: list[int] = []
    packed: list[PackedRow] = []
    labels: list[tuple[int, int, int]] = []
    for owner, row in enumerate(rows):
        start = len(ids)
        branch = (len(row.branch.ids), row.branch.at) if row.branch else (0, 0)
        packed.append(PackedRow(start, len(row.ids), *branch))
        labels += [(start + place, target, owner) for place, target in predictions(row)]
        ids += row.all_ids
    return MicroBatch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor([place for row in packed for place in positions(row)], dtype=torch.long),
        rows=tuple(packed),
        predictors=torch.tensor([place for place, _, _ in labels], dtype=torch.long),
        targets=torch.tensor([target for _, target, _ in labels], dtype=torch.long),
        owners=torch.tensor([owner for _, _, owner in labels], dtype=torch.long),
        lines=tuple(row.line for row in rows),
    )


def batches_of_update(rows: Sequence[EncodedRow], update: int, schedule: Schedule, seed: int) -> list[MicroBatch]:
    """The micro-batches of one update."""
    chosen = [rows[index] for index in rows_of_update(update, schedule, seed)]
    groups = micro_batches([len(row.all_ids) for row in chosen], schedule.max_rows, schedule.max_tokens)
    return [collate([chosen[index] for index in group]) for group in groups]
