"""Loss and token accuracy on rows that are not learned: no gradients, no dropout, no draw from any generator."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from app.domain.attempts import EncodedRow
from worker.training.batches import MicroBatch, collate, pack_micro_batches
from worker.training.loss import measure_loss
from worker.training.model import TrainableModel

PACKED_AT_ONCE = 256
"""Rows among which batches are filled: the search for room grows with their square, the filling hardly gains."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss`: mean over labelled tokens; `accuracy`: share of them that the model would have written itself.

    `sums`: each row's summed loss, of the rows with these `lines`.
    """

    loss: float
    accuracy: float
    lines: list[int]
    sums: list[float]
    seconds: float


class HeldOut:
    """Rows of one part, packed as in training: at most `max_rows` and `max_tokens` a batch."""

    def __init__(self, rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int) -> None:
        self.rows = rows
        self._max_rows = max_rows
        self._max_tokens = max_tokens

    def evaluate(
        self, trainable: TrainableModel, device: torch.device, cut_short: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """None when `cut_short`, asked before each batch, said so."""
        began = time.perf_counter()
        lines: list[int] = []
        sums, hits, labelled = [], [], 0
        with _at_rest(trainable.method.module), torch.no_grad():
            for batch in self._batches():
                if cut_short():
                    return None
                there = batch.to(device)
                by_row, hit = measure_loss(trainable.hidden(there), trainable.head, there)
                sums.append(by_row)
                hits.append(hit)
                lines += batch.lines
                labelled += batch.labelled
        found: list[float] = torch.cat(sums).tolist()
        right = int(torch.stack(hits).sum())
        seconds = time.perf_counter() - began
        return Evaluation(math.fsum(found) / labelled, right / labelled, lines, found, seconds)

    def _batches(self) -> Iterator[MicroBatch]:
        for start in range(0, len(self.rows), PACKED_AT_ONCE):
            near = self.rows[start : start + PACKED_AT_ONCE]
            lengths = [len(row.all_ids) for row in near]
            for group in pack_micro_batches(lengths, self._max_rows, self._max_tokens):
                yield collate([near[index] for index in group])


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout within. bitsandbytes' layers stay in training: at rest they repack 4-bit weights on a CPU."""
    training = [
        module for module in model.modules() if module.training and "bitsandbytes" not in type(module).__module__
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
