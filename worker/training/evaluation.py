"""Loss and token accuracy on held-out rows, without gradients and dropout. No random generator is used."""

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

PACKING_WINDOW = 256
"""Number of rows that are packed together. The time to pack grows with its square, and larger windows hardly fill
micro-batches better."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss`: weighted mean over labelled tokens, as in training.

    `accuracy`: share of labelled tokens that have the highest logit. `verdict_accuracy`: the same of the verdict
    branches' verdicts, None if there are none.

    `loss_sums`: each row's weighted loss sum. `lines`: the line of each row in the dataset.
    """

    loss: float
    accuracy: float
    verdict_accuracy: float | None
    lines: list[int]
    loss_sums: list[float]
    seconds: float


class HeldOut:
    """The rows of one split, packed and weighted as in training: at most `max_rows` and `max_tokens` a micro-batch."""

    def __init__(
        self, rows: Sequence[EncodedRow], max_rows: int | None, max_tokens: int, verdict_weight: float = 1.0
    ) -> None:
        self.rows = rows
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._verdict_weight = verdict_weight

    def evaluate(
        self, trainable: TrainableModel, device: torch.device, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate the model on these rows. `should_stop` is called before each micro-batch; if it is true, None."""
        began = time.perf_counter()
        lines: list[int] = []
        total_weight = 0.0
        loss_sums, hits, verdict_hits = [], [], []
        with _eval_mode(trainable.method.module), torch.no_grad():
            for batch in self._batches():
                if should_stop():
                    return None
                total_weight += batch.total_weight
                on_device = batch.to(device)
                row_sums, batch_hits = measure_loss(trainable.hidden(on_device), trainable.head, on_device)
                loss_sums.append(row_sums)
                hits.append(batch_hits)
                verdict_hits.append(batch_hits[on_device.branch_verdicts])
                lines += batch.lines
        sums: list[float] = torch.cat(loss_sums).tolist()
        every, verdicts = torch.cat(hits), torch.cat(verdict_hits)
        return Evaluation(
            loss=math.fsum(sums) / total_weight,
            accuracy=_share(every) or 0.0,
            verdict_accuracy=_share(verdicts),
            lines=lines,
            loss_sums=sums,
            seconds=time.perf_counter() - began,
        )

    def _batches(self) -> Iterator[MicroBatch]:
        for start in range(0, len(self.rows), PACKING_WINDOW):
            window = self.rows[start : start + PACKING_WINDOW]
            lengths = [len(row.all_ids) for row in window]
            for group in pack_micro_batches(lengths, self._max_rows, self._max_tokens):
                yield collate([window[index] for index in group], self._verdict_weight)


def _share(hits: torch.Tensor) -> float | None:
    return int(hits.sum()) / hits.numel() if hits.numel() else None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, except for bitsandbytes' layers: those would repack 4-bit weights on a CPU."""
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
