"""Attention beside torch's own, and its bits in any company."""

import pytest
import torch
from torch.nn import functional

from tests.inference.test_batch_invariance import to_the_bit
from worker.inference.model.attention import attend

HEADS, WIDTH, POSITIONS = 3, 64, 96


def hidden(seen: list[int], positions: int, heads: int = HEADS) -> torch.Tensor:
    """A mask of rows that see their first positions, the same for each of their heads."""
    mask = torch.arange(positions) >= torch.tensor(seen).repeat_interleave(heads)[:, None]
    return torch.zeros(mask.shape).masked_fill_(mask, -torch.inf)[:, None]


@pytest.mark.parametrize(("heads", "positions", "width"), [(HEADS, POSITIONS, WIDTH), (1, 32, 8)])
@pytest.mark.parametrize("queries", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("is_given", [True, False])
def test_it_is_what_torch_computes(heads: int, positions: int, width: int, queries: int, is_given: bool) -> None:
    q, (k, v) = torch.randn(2 * heads, queries, width), torch.randn(2, 2 * heads, positions, width)
    mask = hidden([positions, 11], positions, heads)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    out = torch.empty_like(q) if is_given else None
    seen = attend(q, k, v, mask, 0.3, out)
    assert torch.allclose(seen, expected, atol=1e-5)
    assert out is None or torch.equal(out, seen)


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
        query, keys = torch.randn(heads, 1, width).bfloat16(), 3 * torch.randn(heads, positions, width)
        keys -= (keys @ query.float().mT) * query.float() / query.float().square().sum(-1, keepdim=True)
        rest = torch.randn(heads, queries - 1, width).bfloat16()
        row = torch.cat([rest, query], 1), keys.bfloat16(), torch.randn(heads, positions, width).bfloat16()
        mask = hidden([positions - 2], positions, heads).bfloat16()
        alone = attend(*row, mask, 200)
        longer = [functional.pad(stored, (0, 0, 0, 64)).repeat(4, 1, 1) for stored in row[1:]]
        far = hidden([positions - 2, 3, 5, 7], positions + 64, heads).bfloat16()
        assert torch.equal(attend(row[0].repeat(4, 1, 1), longer[0], longer[1], far, 200)[:heads], alone)
        more = torch.cat([torch.randn(heads, 200, width).bfloat16(), row[0]], 1)
        assert torch.equal(attend(more, row[1], row[2], mask, 200)[:, 200:], alone)


@to_the_bit
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("positions", [96, 480, 512, 1024])
def test_company_changes_no_bit_of_values_that_nearly_cancel(heads: int, positions: int) -> None:
    """Weights of two keys each are alike, and their values differ by the sign but for small terms."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        keys = torch.randn(heads, positions // 2, WIDTH, generator=draw).repeat_interleave(2, 1).bfloat16()
        values = torch.randn(heads, positions // 2, WIDTH, generator=draw).repeat_interleave(2, 1)
        values[:, 1::2] *= -1
        order = torch.randperm(positions, generator=draw)
        keys, values = keys[:, order], (values + 2**-9)[:, order].bfloat16()
        query = torch.randn(heads, 3, WIDTH, generator=draw).bfloat16()
        mask = hidden([positions], positions, heads).bfloat16()
        alone = attend(query, keys, values, mask, 0.1)
        others = torch.randn(heads, 221, WIDTH, generator=draw).bfloat16()  # 224 with the query's: whole blocks
        assert torch.equal(attend(torch.cat([others, query], 1), keys, values, mask, 0.1)[:, 221:], alone)
        longer = [functional.pad(stored, (0, 0, 0, 64)).repeat(4, 1, 1) for stored in (keys, values)]
        far = hidden([positions, 3, 5, 7], positions + 64, heads).bfloat16()
        assert torch.equal(attend(query.repeat(4, 1, 1), longer[0], longer[1], far, 0.1)[:heads], alone)
