"""How rows lie in a batch, one behind the other without padding, and which token may look at which.

Pure: it knows no model and no data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class PackedRow(NamedTuple):
    """A trajectory's tokens [start, start + length), and right behind them the `branch` tokens of its branch, which
    stand as if the trajectory had ended after its first `at` tokens: those and each other are all they see."""

    start: int
    length: int
    branch: int = 0
    at: int = 0

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length + self.branch)


def positions(row: PackedRow) -> list[int]:
    """Each token's place in the text that it belongs to."""
    return [*range(row.length), *range(row.at, row.at + row.branch)]


def visible(row: PackedRow, device: torch.device) -> torch.Tensor:
    """[tokens, tokens]: whether the query of the first index may look at the key of the second."""
    size = row.length + row.branch
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    mask[row.length :, row.at : row.length] = False
    return mask


def visible_in_batch(rows: Sequence[PackedRow], device: torch.device, window: int | None = None) -> torch.Tensor:
    """The same for a whole batch: no row looks at another, and no token further back than `window` places."""
    mask = torch.zeros(rows[-1].tokens.stop, rows[-1].tokens.stop, dtype=torch.bool, device=device)
    for row in rows:
        mask[row.tokens, row.tokens] = visible(row, device)
    if window is None:
        return mask
    places = torch.tensor([place for row in rows for place in positions(row)], device=device)
    return mask & (places[:, None] - places < window)
