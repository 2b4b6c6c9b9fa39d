"""Sequence packing without padding (as transformers' DataCollatorWithFlattening) and its attention masks."""

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
    """Each token's position id: a branch goes on where it left its trajectory."""
    return [*range(row.length), *range(row.at, row.at + row.branch)]


def visible(row: PackedRow, device: torch.device) -> torch.Tensor:
    """Boolean [num_queries, num_keys]: True where a query attends to a key."""
    size = row.length + row.branch
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    mask[row.length :, row.at : row.length] = False
    return mask


def visible_in_batch(rows: Sequence[PackedRow], device: torch.device, window: int | None = None) -> torch.Tensor:
    """The same for a whole batch: no row attends to another, and no token to one `window` or more positions back."""
    mask = torch.zeros(rows[-1].tokens.stop, rows[-1].tokens.stop, dtype=torch.bool, device=device)
    for row in rows:
        mask[row.tokens, row.tokens] = visible(row, device)
    if window is None:
        return mask
    places = torch.tensor([place for row in rows for place in positions(row)], device=device)
    return mask & (places[:, None] - places < window)
