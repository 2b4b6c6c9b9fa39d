"""Sequence packing without padding (as transformers' DataCollatorWithFlattening) and its attention masks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class PackedRow(NamedTuple):
    """A trajectory's tokens [start, start + length), followed by the `branch_length` tokens of its branch.

    The branch continues the trajectory after its first `branch_start` tokens. A token of the branch attends to those
    tokens and, causally, to the branch.
    """

    start: int
    length: int
    branch_length: int = 0
    branch_start: int = 0

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length + self.branch_length)


def position_ids(row: PackedRow) -> list[int]:
    """Position ids of a row's tokens. Those of a branch start at `branch_start`."""
    return [*range(row.length), *range(row.branch_start, row.branch_start + row.branch_length)]


def attention_mask(row: PackedRow, device: torch.device) -> torch.Tensor:
    """Boolean mask [num_queries, num_keys] of one row: True where a query attends to a key."""
    size = row.length + row.branch_length
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    mask[row.length :, row.branch_start : row.length] = False
    return mask


def batch_attention_mask(rows: Sequence[PackedRow], device: torch.device, window: int | None = None) -> torch.Tensor:
    """Boolean mask [num_tokens, num_tokens] of a batch: no row attends to another row.

    `window`: the size of sliding-window attention. A query attends to no key that is `window` or more positions back.
    """
    mask = torch.zeros(rows[-1].tokens.stop, rows[-1].tokens.stop, dtype=torch.bool, device=device)
    for row in rows:
        mask[row.tokens, row.tokens] = attention_mask(row, device)
    if window is None:
        return mask
    positions = torch.tensor([position for row in rows for position in position_ids(row)], device=device)
    return mask & (positions[:, None] - positions < window)
