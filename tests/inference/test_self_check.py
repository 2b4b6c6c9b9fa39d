"""The self-check that decides whether answers are promised to be the same in any company."""

import pytest
import torch

from worker.inference.model.batch_invariance import (
    BLOCKED,
    PLAIN,
    add_by_row_blocks,
    by_row_blocks,
    is_batch_invariant,
    passes_check,
)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product that no order of summing shows in."""
    return (x.double() @ weight.double().t()).bfloat16()


def split_beyond_32_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What AMX kernels do: over many inputs and more rows, two sums that are added in float32."""
    if len(x) <= 32 or x.shape[1] < 512:
        return exact(x, weight)
    half = x.shape[1] // 2
    first, second = (x[:, part].double() @ weight[:, part].double().t() for part in (slice(half), slice(half, None)))
    return (first.float() + second.float()).bfloat16()


def other_bits_for_few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return exact(x, weight) + (len(x) < 32)


def test_kernels_that_sum_alike_need_no_blocks() -> None:
    assert passes_check(PLAIN, exact)


def test_kernels_that_split_sums_over_many_rows_pass_in_blocks_only() -> None:
    assert not passes_check(PLAIN, split_beyond_32_rows)
    assert passes_check(BLOCKED, split_beyond_32_rows)


def test_kernels_that_sum_alike_in_no_known_shapes_give_no_promise() -> None:
    assert not passes_check(PLAIN, other_bits_for_few_rows)
    assert not passes_check(BLOCKED, other_bits_for_few_rows)


def test_only_bfloat16_on_a_cpu_is_promised() -> None:
    assert not is_batch_invariant(torch.device("cpu"), torch.float32)
    assert not is_batch_invariant(torch.device("cuda"), torch.bfloat16)


def test_blocks_of_rows_are_computed_one_by_one_and_joined_in_order() -> None:
    x, out, sizes = torch.arange(70.0)[:, None].expand(-1, 512), torch.ones(70, 512), list[int]()

    def double(block: torch.Tensor) -> torch.Tensor:
        sizes.append(len(block))
        return 2 * block

    assert torch.equal(by_row_blocks(double, x, BLOCKED), 2 * x)
    assert torch.equal(add_by_row_blocks(lambda to, block: to + double(block), out, x, BLOCKED), 2 * x + 1)
    assert sizes == [32, 32, 6] * 2
    assert torch.equal(by_row_blocks(double, x, PLAIN), 2 * x)
    assert torch.equal(by_row_blocks(double, x[:, :480], BLOCKED), 2 * x[:, :480])
    assert sizes[-2:] == [70, 70]


@pytest.mark.parametrize(("rank", "padded"), [(1, 8), (8, 8), (9, 16), (24, 32), (32, 32), (33, 64), (96, 96)])
def test_a_rank_begins_at_a_tile_or_lies_within_one_in_every_slot(rank: int, padded: int) -> None:
    assert BLOCKED.padded_rank(rank) == padded
    assert PLAIN.padded_rank(rank) == rank
    for slot in range(9):
        first, last = slot * padded, slot * padded + rank - 1
        assert first % 32 == 0 or first // 32 == last // 32
