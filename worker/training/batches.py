"""Which rows an update takes, and how their sequences share micro-batches. Pure: it knows no model.

Where the data stands follows from the update's number and the seed, so a resumed run needs no state of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from app.domain.attempts import EncodedRow, EncodedSequence
from app.domain.plans import Schedule
from worker.training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right to one length.

    `ids`: [rows, length]. `predictors`: places in the flattened [rows × length] whose next token carries a
    loss; `targets`: those tokens. `tokens`: how many of `ids` are real.
    """

    ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    tokens: int

    @property
    def labelled(self) -> int:
        return self.targets.numel()

    @property
    def padded(self) -> int:
        return self.ids.numel()

    def to(self, device: torch.device) -> "Batch":
        ids, predictors, targets = (t.to(device) for t in (self.ids, self.predictors, self.targets))
        return Batch(ids, predictors, targets, self.tokens)


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
    if any(not 0 <= token < vocab_size for sequence in row.sequences for token in sequence.ids):
        raise TrainingError(
            "vocabulary_mismatch",
            f"line {row.line} of the dataset has a token id that the base model does not embed",
            "the tokenizer and the weights of this base model do not belong together; add it again",
        )
    if not any(labels(sequence) for sequence in row.sequences):
        raise TrainingError(
            "no_labelled_tokens",
            f"line {row.line} of the dataset has no token to learn from",
            "remove the row, or raise global_max_sequence_length",
        )


def labels(sequence: EncodedSequence) -> list[int]:
    """Positions of the tokens that carry a loss. The first of a sequence never does: nothing predicts it."""
    return [place for start, end in sequence.trained for place in range(max(start, 1), end)]


def rows_of_update(update: int, schedule: Schedule, seed: int) -> list[int]:
    """Indices of the rows of update number `update`, from 1. An epoch's last update may be smaller."""
    epoch, position = divmod(update - 1, schedule.updates_per_epoch)
    order = list(range(schedule.rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[position * schedule.rows_per_update :][: schedule.rows_per_update]


def micro_batches(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows × longest stays within `max_tokens`; one longer than that stands alone.

    Neighbours in length share a batch, which keeps padding low; the longest come first, so that too little
    memory shows at once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        last = groups[-1] if groups else []
        fits = last and (len(last) + 1) * lengths[last[0]] <= max_tokens
        if fits and (max_rows is None or len(last) < max_rows):
            last.append(index)
        else:
            groups.append([index])
    return groups


def collate(sequences: Sequence[EncodedSequence], pad_id: int) -> Batch:
    """One batch of `sequences`. Padding stands on the right, where causal attention never looks."""
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids, dtype=torch.long)
        places = labels(sequence)
        predictors += [row * length + place - 1 for place in places]
        targets += [sequence.ids[place] for place in places]
    return Batch(
        ids=ids,
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        tokens=sum(len(sequence.ids) for sequence in sequences),
    )


def batches_of_update(
    rows: Sequence[EncodedRow], update: int, schedule: Schedule, seed: int, pad_id: int
) -> list[Batch]:
    """The micro-batches of one update: all the sequences of its rows."""
    chosen = [sequence for index in rows_of_update(update, schedule, seed) for sequence in rows[index].sequences]
    groups = micro_batches([len(s.ids) for s in chosen], schedule.max_rows, schedule.max_tokens)
    return [collate([chosen[index] for index in group], pad_id) for group in groups]
