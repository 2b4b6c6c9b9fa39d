"""Each row's loss when it was last computed: which rows hurt. It knows no model.

Training computes a row's loss anyway; here it is only remembered. Held-out rows bring theirs when they are evaluated.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from app.domain.attempts import EncodedRow
from worker.training.batches import shifted_labels


class RowLosses:
    """`rows`: of all parts, in the order of the work order."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self._rows = rows
        self._places = {row.line: place for place, row in enumerate(rows)}
        self._labelled = [len(shifted_labels(row)) for row in rows]
        self._loss = [math.nan] * len(rows)
        self._update = [-1] * len(rows)

    def note(self, lines: Iterable[int], sums: Iterable[float], update: int) -> None:
        """Remember what update number `update` saw: the sum of each row's loss over its labelled tokens."""
        for line, total in zip(lines, sums, strict=True):
            place = self._places[line]
            self._loss[place] = total / self._labelled[place]
            self._update[place] = update

    def saved(self) -> dict[str, torch.Tensor]:
        return {
            "loss": torch.tensor(self._loss, dtype=torch.float64),
            "update": torch.tensor(self._update, dtype=torch.int64),
        }

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        self._loss, self._update = saved["loss"].tolist(), saved["update"].tolist()

    def write(self, path: Path) -> Path:
        """JSON lines of {line, part, tokens, labelled_tokens, loss, update}.

        `loss` is the mean over the row's labelled tokens, and null where it was not finite; `update` the one at which
        it was seen. Both are null for a row that has not been looked at.
        """
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as out:
            for row, labelled, loss, update in zip(self._rows, self._labelled, self._loss, self._update, strict=True):
                told = {
                    "line": row.line,
                    "part": row.part.value,
                    "tokens": len(row.all_ids),
                    "labelled_tokens": labelled,
                    "loss": loss if math.isfinite(loss) else None,
                    "update": update if update >= 0 else None,
                }
                out.write(json.dumps(told) + "\n")
        return path
