"""Attention of a step over stored keys and values, the queries of a head of keys together. Knows no models."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from worker.inference.cache.kv_cache import BatchSegment, LayerKVCache

SMALL = 16**3
"""Multiplications of a product that torch leaves to another kernel, with another order of summing, and fewer."""


class Attention:
    """That of one step: each row sees its own positions. What is the same in every layer is worked out once."""

    def __init__(self, parts: Sequence[BatchSegment], seen: torch.Tensor) -> None:
        """`seen`: zeros for all tokens, [tokens, kv heads, group, head_dim], which those of no part keep."""
        kv_heads, group = seen.shape[1:3]
        self._split = kv_heads * group, kv_heads
        self._seen = seen.flatten(1)
        self._parts = [(part, _Decoding(part, seen) if part.decodes else _Reading(part, seen)) for part in parts]

    def __call__(self, qk: torch.Tensor, v: torch.Tensor, scaling: float, kept: LayerKVCache) -> torch.Tensor:
        """qk: heads of queries and of keys, [tokens, heads + kv heads, head_dim]; v: [tokens, kv heads, head_dim] →
        [tokens, heads · head_dim], which the next call writes anew."""
        for part, attend in self._parts:
            q, k = torch.split_with_sizes(qk[part.tokens], self._split, 1)
            attend(q, k, v[part.tokens], scaling, kept)
        return self._seen


class _Decoding:
    """For a part whose rows have a token each."""

    def __init__(self, part: BatchSegment, seen: torch.Tensor) -> None:
        self._part = part
        self._mask = _hidden(part, seen.dtype)[:, 0].repeat_interleave(seen.shape[1], 0)
        self._seen = seen[part.tokens].flatten(0, 1)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, kept: LayerKVCache) -> None:
        keys, values = kept.write(self._part, k, v)
        q = q.reshape(self._seen.shape)
        attended(q, keys.flatten(0, 1), values.flatten(0, 1), self._mask, scaling, self._seen)


class _Reading:
    """For a part that is tokens of one row's prompt: those of a head of keys stand in one run."""

    def __init__(self, part: BatchSegment, seen: torch.Tensor) -> None:
        self._part = part
        self._mask = _hidden(part, seen.dtype)[0].repeat_interleave(seen.shape[2], 1)
        self._seen = seen[part.tokens].transpose(0, 1)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, kept: LayerKVCache) -> None:
        keys, values = kept.write(self._part, *(new.transpose(0, 1)[None] for new in (k, v)))
        kv_heads, count, group, width = self._seen.shape
        q = q.view(count, kv_heads, group, width).transpose(0, 1).flatten(1, 2)
        self._seen.copy_(attended(q, keys[0], values[0], self._mask, scaling).view(self._seen.shape))


def _hidden(part: BatchSegment, dtype: torch.dtype) -> torch.Tensor:
    """A part's mask as numbers to be added."""
    return torch.zeros(part.mask.shape, dtype=dtype, device=part.mask.device).masked_fill_(~part.mask, -torch.inf)


def attended(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each query sees, [heads, queries, head_dim], written to `out` where that is given. Heads are the key-value
    heads of all rows.

    `keys`, `values`: [heads, positions, head_dim]. `mask`: [heads or 1, queries or 1, positions], 0 where a key is seen
    and -inf where not. In bfloat16 on a CPU a query has the same bits beside any others, and over any number of
    positions of which it does not see the last ones. Torch's fused kernel has not, and is slower there for several rows
    (decision 16). Keys and values without gaps between heads are read where they are, others are copied.
    """
    heads, count, width = queries.shape
    if queries.device.type != "cpu":
        q, k, v, hidden = (tensor[None] for tensor in (queries, keys, values, mask))
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=scaling)[0]
        return seen if out is None else out.copy_(seen)
    spare = SMALL // (heads * keys.shape[1] * width) + 1 - count
    if spare > 0:
        mask = functional.pad(mask.expand(-1, count, -1), (0, 0, 0, spare))
        seen = attended(functional.pad(queries, (0, 0, 0, spare)), keys, values, mask, scaling)[:, :count]
        return seen if out is None else out.copy_(seen)
    scores = torch.bmm(queries, keys.transpose(1, 2))
    return torch.bmm(torch.add(mask, scores, alpha=scaling).softmax(-1), values, out=out)
