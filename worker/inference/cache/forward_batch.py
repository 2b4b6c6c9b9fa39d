"""What one forward reads: the new tokens of a step, in segments, and where the KV cache stores them."""

from typing import NamedTuple

import torch


class BatchSegment(NamedTuple):
    """Rows of a step that get equally many new tokens: all decoding rows, or one row's prefill chunk.

    - `tokens`: the segment's slice of the step's tokens, row by row.
    - `rows`: its slice of the KV cache's rows.
    - `cache_index`: the (rows, heads, positions) at which a layer's cache stores the new tokens.
    - `mask`: [num_rows or 1, 1, new tokens a row, num_visible], True where a query attends to a key.
    - `num_logits`: the number of last tokens in each row whose logits are wanted.
    """

    tokens: slice
    rows: slice
    cache_index: tuple[slice | torch.Tensor, slice, slice | torch.Tensor]
    mask: torch.Tensor
    num_logits: int

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def is_decode(self) -> bool:
        """Whether each row has one new token, at a position of its own."""
        return isinstance(self.cache_index[0], torch.Tensor)


class ForwardBatch(NamedTuple):
    """The input of one forward.

    - `token_ids`, `positions`: [num_tokens].
    - `segments`: the tokens' segments, in order.
    - `tokens_per_row`: [num_rows], in the order of the segments.
    - `logits_indices`: [num_logits], the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: list[BatchSegment]
    tokens_per_row: torch.Tensor
    logits_indices: torch.Tensor

    @property
    def is_decode_only(self) -> bool:
        """Whether the step has no prefill chunk."""
        return all(segment.is_decode for segment in self.segments)


class PrefillChunk(NamedTuple):
    """Prompt tokens for `row`, whose first `start` positions are in the cache. `num_logits` counts from the chunk's
    end; a prompt's last chunk needs at least one."""

    row: int
    token_ids: list[int]
    start: int
    num_logits: int


def decode_segment(positions: torch.Tensor, num_visible: int) -> BatchSegment:
    """One new token for each of the first rows, at `positions` [num_rows], over the first `num_visible` positions."""
    rows = slice(0, len(positions))
    mask = torch.arange(num_visible, device=positions.device) <= positions[:, None]
    cache_index = torch.arange(len(positions), device=positions.device), slice(None), positions
    return BatchSegment(rows, rows, cache_index, mask[:, None, None], num_logits=1)


def prefill_segment(chunk: PrefillChunk, first_token: int, num_visible: int, device: torch.device) -> BatchSegment:
    """A prefill chunk whose tokens stand in the step from `first_token` on."""
    end = chunk.start + len(chunk.token_ids)
    keys = torch.arange(num_visible, device=device)
    mask = keys <= torch.arange(chunk.start, end, device=device)[:, None]
    tokens, row = slice(first_token, first_token + len(chunk.token_ids)), slice(chunk.row, chunk.row + 1)
    cache_index = (row, slice(None), slice(chunk.start, end))
    return BatchSegment(tokens, row, cache_index, mask[None, None], chunk.num_logits)
