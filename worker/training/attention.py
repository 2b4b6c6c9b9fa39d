"""Grouped-query attention (Ainslie et al., 2023) over packed rows, with its backward, and RoPE (Su et al., 2021).

Queries are [num_kv_heads, group, num_tokens, head_dim], keys and values [num_kv_heads, num_tokens, head_dim]. A group
of queries shares one key-value head, so a group is one product and no key is copied. Each row attends to itself alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from app.domain.memory import PLAIN_ATTENTION_UP_TO, query_block
from worker.training.packing import PackedRow, attention_mask


class Rope(NamedTuple):
    """RoPE's cosines and sines of each token's position, [num_tokens, head_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def transposed(self) -> "Rope":
        """The inverse rotation, for gradients."""
        return Rope(self.cos, -self.sin)


class Block(NamedTuple):
    """Queries [start, stop) of a row, which see no key from `stop` on. `mask`: float32 [group × queries, keys], to add
    to their scores of the keys from `masked_from` on; those before it they all see."""

    start: int
    stop: int
    masked_from: int
    mask: torch.Tensor


class Span(NamedTuple):
    """A row's tokens, and its blocks where scores are held; else, for the fused kernel, a boolean mask, or None where
    the row is causal and nothing more."""

    tokens: slice
    blocks: tuple[Block, ...]
    mask: torch.Tensor | None


def spans_of(rows: Sequence[PackedRow], group: int, device: torch.device) -> list[Span]:
    return [_span(row, group, device) for row in rows]


def _span(row: PackedRow, group: int, device: torch.device) -> Span:
    size = row.length + row.branch_length
    if device.type != "cpu" or size > PLAIN_ATTENTION_UP_TO:
        return Span(row.tokens, (), attention_mask(row, device) if row.branch_length else None)
    mask = attention_mask(row, device)
    long = query_block(size)
    starts = range(0, size, long)
    return Span(row.tokens, tuple(_block(row, mask, at, min(at + long, size), group) for at in starts), None)


def _block(row: PackedRow, mask: torch.Tensor, start: int, stop: int, group: int) -> Block:
    first = min(start, row.branch_start) if stop > row.length else start  # what a branch left is hidden from it
    hidden = ~mask[start:stop, first:stop].repeat(group, 1)
    return Block(start, stop, first, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf))


def to_heads(flat: torch.Tensor, kv_heads: int, width: int) -> torch.Tensor:
    """[num_tokens, num_heads × head_dim] → [num_kv_heads, group, num_tokens, head_dim], as a view."""
    return flat.view(flat.shape[0], kv_heads, -1, width).permute(1, 2, 0, 3)


def to_tokens(heads: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, group, num_tokens, head_dim] → [num_tokens, num_heads × head_dim]."""
    return heads.permute(2, 0, 1, 3).reshape(heads.shape[2], -1)


def rotate(heads: torch.Tensor, rope: Rope) -> torch.Tensor:
    """RoPE: rotate each pair (i, i + head_dim / 2) by its token's angle."""
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (first, second), (left, right) = heads.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, rope.cos, out=left).addcmul_(second, rope.sin, value=-1)
    torch.mul(second, rope.cos, out=right).addcmul_(first, rope.sin)
    return turned


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span], scaling: float) -> torch.Tensor:
    """softmax(`scaling` × q·k) · v for each row, [num_kv_heads, group, num_tokens, head_dim]."""
    attn_out = torch.empty_like(q)
    for span in spans:
        at = span.tokens
        kernel = _plain if span.blocks else _fused
        attn_out[:, :, at] = kernel(q[:, :, at], k[:, at], v[:, at], span, scaling)
    return attn_out


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span], scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v. Probabilities are recomputed: that is cheaper than saving them for every layer."""
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for span in spans:
        at = span.tokens
        backward = _plain_backward if span.blocks else _fused_backward
        found = backward(grad[:, :, at], q[:, :, at], k[:, at], v[:, at], span, scaling)
        d_q[:, :, at], d_k[:, at], d_v[:, at] = found
    return d_q, d_k, d_v


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float) -> torch.Tensor:
    attn_out = torch.empty_like(q)
    for block in span.blocks:
        queries = q[:, :, block.start : block.stop]
        probabilities = _probabilities(queries.flatten(1, 2), k, block, scaling).to(v.dtype)
        attn_out[:, :, block.start : block.stop] = torch.bmm(probabilities, v[:, : block.stop]).view(queries.shape)
    return attn_out


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float
) -> Gradients:
    """Keys and values add up the gradients of all blocks: in float32."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
    for block in span.blocks:
        part, stop = slice(block.start, block.stop), block.stop
        queries, grads = q[:, :, part].flatten(1, 2), grad[:, :, part].flatten(1, 2)
        probabilities = _probabilities(queries, k, block, scaling)
        d_v[:, :stop] += torch.bmm(probabilities.to(v.dtype).transpose(1, 2), grads)
        d_probabilities = torch.bmm(grads, v[:, :stop].transpose(1, 2)).float()
        d_scores = (
            torch._softmax_backward_data(d_probabilities, probabilities, -1, torch.float32).mul_(scaling).to(q.dtype)
        )
        d_q[:, :, part] = torch.bmm(d_scores, k[:, :stop]).view(d_q[:, :, part].shape)
        d_k[:, :stop] += torch.bmm(d_scores.transpose(1, 2), queries)
    return d_q, d_k, d_v


def _fused_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float
) -> Gradients:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attn_out = _fused(leaves[0], leaves[1], leaves[2], span, scaling)
        d_q, d_k, d_v = torch.autograd.grad(attn_out, leaves, grad)
    return d_q, d_k, d_v


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float) -> torch.Tensor:
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=span.mask, is_causal=span.mask is None, scale=scaling
    )


def _probabilities(q: torch.Tensor, k: torch.Tensor, block: Block, scaling: float) -> torch.Tensor:
    """[num_kv_heads, group × num_queries, num_keys] in float32: rounded scores would shift every probability."""
    scores = torch.bmm(q.float() * scaling, k[:, : block.stop].float().transpose(1, 2))
    scores[:, :, block.masked_from :].add_(block.mask)
    return scores.softmax(-1)
