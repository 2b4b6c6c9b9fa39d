"""Attention over the KV cache. The query heads that share a key-value head are computed together (GQA)."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from worker.inference.cache.forward_batch import BatchSegment
from worker.inference.cache.kv_cache import LayerKVCache
from worker.inference.model.batch_invariance import product_shapes, row_blocks

SMALL_PRODUCT = 16**3
"""Up to this many multiplications, torch computes a product by another kernel, which sums in another order."""

LONG_SUM = 2_048
"""AMX kernels split a sum over more positions from fewer rows on."""


class Attention:
    """The attention of one step. What is the same in every layer is computed once, here."""

    def __init__(self, segments: Sequence[BatchSegment], out: torch.Tensor) -> None:
        """`out`: the output buffer, zeros [num_tokens, num_kv_heads, queries a kv head, head_dim]. Tokens of no segment
        stay zero."""
        num_kv_heads, group = out.shape[1:3]
        self._split = num_kv_heads * group, num_kv_heads
        self._out = out.flatten(1)
        self._segments = [
            (segment, _DecodeAttention(segment, out) if segment.is_decode else _PrefillAttention(segment, out))
            for segment in segments
        ]

    def __call__(self, qk: torch.Tensor, v: torch.Tensor, scaling: float, cache: LayerKVCache) -> torch.Tensor:
        """Store the new keys and values, and attend.

        - `qk`: [num_tokens, num_heads + num_kv_heads, head_dim].
        - `v`: [num_tokens, num_kv_heads, head_dim].
        - Returns [num_tokens, num_heads · head_dim], which the next call overwrites.
        """
        for segment, attend_segment in self._segments:
            q, k = torch.split_with_sizes(qk[segment.tokens], self._split, 1)
            attend_segment(q, k, v[segment.tokens], scaling, cache)
        return self._out


class _DecodeAttention:
    """A segment whose rows have one new token each."""

    def __init__(self, segment: BatchSegment, out: torch.Tensor) -> None:
        self._segment = segment
        # [num_rows · num_kv_heads, 1, num_visible]
        self._mask = _additive_mask(segment, out.dtype)[:, 0].repeat_interleave(out.shape[1], 0)
        self._out = out[segment.tokens].flatten(0, 1)  # [num_rows · num_kv_heads, group, head_dim]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, cache: LayerKVCache) -> None:
        keys, values = cache.write(self._segment, k, v)
        q = q.reshape(self._out.shape)
        attend(q, keys.flatten(0, 1), values.flatten(0, 1), self._mask, scaling, self._out)


class _PrefillAttention:
    """A segment that is one row's prefill chunk. The queries of a key-value head are contiguous."""

    def __init__(self, segment: BatchSegment, out: torch.Tensor) -> None:
        self._segment = segment
        self._mask = _additive_mask(segment, out.dtype)[0].repeat_interleave(out.shape[2], 1)
        self._out = out[segment.tokens].transpose(0, 1)  # [num_kv_heads, new tokens, group, head_dim]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, cache: LayerKVCache) -> None:
        keys, values = cache.write(self._segment, *(new.transpose(0, 1)[None] for new in (k, v)))
        num_kv_heads, num_tokens, group, head_dim = self._out.shape
        q = q.view(num_tokens, num_kv_heads, group, head_dim).transpose(0, 1).flatten(1, 2)
        self._out.copy_(attend(q, keys[0], values[0], self._mask, scaling).view(self._out.shape))


def _additive_mask(segment: BatchSegment, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is visible, -inf where not; the shape of the segment's mask."""
    zeros = torch.zeros(segment.mask.shape, dtype=dtype, device=segment.mask.device)
    return zeros.masked_fill_(~segment.mask, -torch.inf)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q·kᵀ · scaling + mask) · v, [heads, queries, head_dim], written to `out` if given.

    - `queries`: [heads, queries, head_dim]; heads are the key-value heads of all rows.
    - `keys`, `values`: [heads, positions, head_dim]. They are copied if there are gaps between heads.
    - `mask`: [heads or 1, queries or 1, positions], 0 or -inf.

    Batch-invariant in bf16 on a CPU: a query's bits depend neither on the other queries nor on the number of masked
    positions behind its own. torch's fused kernel is not, and is slower there for several rows (decision 16).
    """
    heads, num_queries, head_dim = queries.shape
    if queries.device.type != "cpu":
        q, k, v, hidden = (tensor[None] for tensor in (queries, keys, values, mask))
        attn_out = functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=scaling)[0]
        return attn_out if out is None else out.copy_(attn_out)
    shapes = product_shapes(queries)
    max_rows = shapes.rows_per_product(keys.shape[1])
    if max_rows is not None and heads == 1:  # AMX kernels split the sums of a single head by rules of their own
        q, k, v = (tensor.expand(2, -1, -1) for tensor in (queries, keys, values))
        attn_out = attend(q, k, v, mask, scaling)[:1]
        return attn_out if out is None else out.copy_(attn_out)
    min_queries = 1 if shapes.max_rows is None else 2  # AMX kernels sum one query in another order
    padding = max(min_queries, SMALL_PRODUCT // (heads * keys.shape[1] * head_dim) + 1) - num_queries
    if padding > 0:
        mask = functional.pad(mask.expand(-1, num_queries, -1), (0, 0, 0, padding))
        padded = functional.pad(queries, (0, 0, 0, padding))
        attn_out = attend(padded, keys, values, mask, scaling)[:, :num_queries]
        return attn_out if out is None else out.copy_(attn_out)
    scores = torch.bmm(queries, keys.transpose(1, 2))  # [heads, queries, positions]
    weights = torch.add(mask, scores, alpha=scaling).softmax(-1)
    if max_rows is None:
        return torch.bmm(weights, values, out=out)
    blocks = row_blocks(num_queries, max_rows if keys.shape[1] <= LONG_SUM else max_rows // 2)
    attn_out = torch.cat([torch.bmm(weights[:, block], values) for block in blocks], 1)
    return attn_out if out is None else out.copy_(attn_out)
