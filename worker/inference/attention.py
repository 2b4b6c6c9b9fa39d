"""Attention over stored keys and values, the queries of a head of keys together. Knows no models and no stores."""

import torch
from torch.nn import functional

SMALL = 16**3
"""Multiplications of a product that torch leaves to another kernel, with another order of summing, and fewer."""


def attended(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What each query sees, [rows, kv heads, queries, head_dim].

    `keys`, `values`: [rows, kv heads, positions, head_dim]. `mask`: [rows or 1, 1, queries, positions], 0 where a key
    is seen and -inf where not. In bfloat16 on a CPU a query has the same bits beside any others, and over any number of
    positions of which it does not see the last ones. Torch's fused kernel has not, and is slower there for several rows
    (decision 16). Keys and values without gaps between rows are read where they are, others are copied.
    """
    if queries.device.type != "cpu":
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    rows, heads, count, width = queries.shape
    spare = SMALL // (rows * heads * keys.shape[2] * width) + 1 - count
    if spare > 0:
        queries, mask = (functional.pad(tensor, (0, 0, 0, spare)) for tensor in (queries, mask))
    scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(rows, heads, *mask.shape[2:])
    shares = torch.add(mask, scores, alpha=scaling).softmax(-1)
    return torch.bmm(shares.flatten(0, 1), values.flatten(0, 1)).view(rows, heads, -1, width)[:, :, :count]
