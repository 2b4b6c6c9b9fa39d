"""Attention beside torch's own, and its bits in any company."""

import pytest
import torch
from torch.nn import functional

from tests.inference.test_company import to_the_bit
from worker.inference.attention import attended

HEADS, WIDTH, POSITIONS = 3, 64, 96


def hidden(seen: list[int], queries: int, positions: int) -> torch.Tensor:
    """A mask of rows that see their first positions."""
    mask = torch.arange(positions) >= torch.tensor(seen)[:, None]
    return torch.zeros(mask.shape).masked_fill_(mask, -torch.inf)[:, None, None].repeat(1, 1, queries, 1)


@pytest.mark.parametrize("queries", [1, 2, 3, 7, 40])
def test_it_is_what_torch_computes(queries: int) -> None:
    q, (k, v) = torch.randn(2, HEADS, queries, WIDTH), torch.randn(2, 2, HEADS, POSITIONS, WIDTH)
    mask = hidden([POSITIONS, 11], queries, POSITIONS)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert torch.allclose(attended(q, k, v, mask, 0.3), expected, atol=1e-5)


def test_a_single_query_of_a_single_head_is_what_torch_computes() -> None:
    q, (k, v) = torch.randn(1, 1, 1, 8), torch.randn(2, 1, 1, 32, 8)
    mask = hidden([5], 1, 32)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert torch.allclose(attended(q, k, v, mask, 0.3), expected, atol=1e-5)


@to_the_bit
@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("positions", [32, 64, 256])
def test_company_changes_no_bit_of_scores_that_nearly_cancel(
    width: int, queries: int, heads: int, positions: int
) -> None:
    """The keys stand nearly at right angles to the queries' sum, which is one of them; a large factor brings out of a
    score what the order of summing leaves of it."""
    for _ in range(40):
        query, keys = torch.randn(1, heads, 1, width).bfloat16(), 3 * torch.randn(1, heads, positions, width)
        keys -= (keys @ query.float().mT) * query.float() / query.float().square().sum(-1, keepdim=True)
        rest = torch.randn(1, heads, queries - 1, width).bfloat16()
        row = torch.cat([rest, query], 2), keys.bfloat16(), torch.randn(1, heads, positions, width).bfloat16()
        mask = hidden([positions - 2], queries, positions).bfloat16()
        alone = attended(*row, mask, 200)
        longer = [functional.pad(stored, (0, 0, 0, 64)).repeat(4, 1, 1, 1) for stored in row[1:]]
        mask = hidden([positions - 2, 3, 5, 7], queries, positions + 64).bfloat16()
        assert torch.equal(attended(row[0].repeat(4, 1, 1, 1), longer[0], longer[1], mask, 200)[:1], alone)
        more = torch.cat([torch.randn(1, heads, 200, width).bfloat16(), row[0]], 2)
        mask = hidden([positions - 2], 200 + queries, positions).bfloat16()
        assert torch.equal(attended(more, row[1], row[2], mask, 200)[:, :, 200:], alone)
