"""Keeps the last loss of each row, to show which rows the model learns badly. It knows no model.

Updates and evaluations compute these losses anyway.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from app.domain.attempts import EncodedRow
from worker.training.batches import shifted_labels


class RowLosses:
    """The last loss of each row. `rows`: the rows of all splits, as in the work order."""

    def __init__(self, rows: Sequence[EncodedRow], verdict_weight: float) -> None:
        self._rows = rows
        self._index_by_line = {row.line: index for index, row in enumerate(rows)}
        labels = [shifted_labels(row) for row in rows]
        self._labelled = [len(own) for own in labels]
        self._weights = [math.fsum(label.weight(verdict_weight) for label in own) for own in labels]
        self._loss = [math.nan] * len(rows)
        self._update = [-1] * len(rows)

    def record(self, lines: Iterable[int], loss_sums: Iterable[float], update: int) -> None:
        """Record the losses that update number `update` computed: each row's weighted sum."""
        for line, loss_sum in zip(lines, loss_sums, strict=True):
            index = self._index_by_line[line]
            self._loss[index] = loss_sum / self._weights[index]
            self._update[index] = update

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`loss` and `update` of each row, [num_rows]. An update of -1: the row has no loss yet."""
        return {
            "loss": torch.tensor(self._loss, dtype=torch.float64),
            "update": torch.tensor(self._update, dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._loss, self._update = state["loss"].tolist(), state["update"].tolist()

    def write(self, path: Path) -> Path:
        """Write JSON lines of {line, part, tokens, labelled_tokens, loss, update}.

        `loss`: weighted mean over the row's labelled tokens, null if it was not finite. `update`: the update that
        computed it. Both are null if the row has no loss yet.
        """
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as out:
            for row, labelled, loss, update in zip(self._rows, self._labelled, self._loss, self._update, strict=True):
                record = {
                    "line": row.line,
                    "part": row.part.value,
                    "tokens": len(row.all_ids),
                    "labelled_tokens": labelled,
                    "loss": loss if math.isfinite(loss) else None,
                    "update": update if update >= 0 else None,
                }
                out.write(json.dumps(record) + "\n")
        return path
