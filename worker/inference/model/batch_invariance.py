"""The shapes in which this CPU's bfloat16 kernels are batch-invariant: a row's bits do not depend on the other rows.

No instruction set implies them, so a self-check computes a few products alone and in batches and compares bits.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional

log = logging.getLogger(__name__)


class ProductShapes(NamedTuple):
    """Rules for the shapes of matrix products.

    - `token_multiple`: a step is padded to a multiple of it.
    - `max_rows`: of one product over more than `unsplit_inputs` inputs, or None for any number. A longer one is
      computed block by block.
    - `unsplit_inputs`: a sum over so many inputs is never split.
    - `rank_tile`: inputs are added by tiles of so many. A LoRA's ranks must lie in a slot's tiles as they do alone.
    - `min_columns`: a fused LoRA has at least so many ranks, the last ones zeros.
    """

    token_multiple: int = 1
    max_rows: int | None = None
    unsplit_inputs: int = 0
    rank_tile: int = 1
    min_columns: int = 1

    def rows_per_product(self, num_inputs: int) -> int | None:
        """The largest number of rows of a product over so many inputs, or None for any number."""
        return None if num_inputs <= self.unsplit_inputs else self.max_rows

    def padded_rank(self, rank: int) -> int:
        """The least rank from `rank` on whose slots, one behind another, begin at a tile or lie within one."""
        if rank > self.rank_tile:
            return -(-rank // self.rank_tile) * self.rank_tile
        return rank if self.rank_tile == 1 else max(MIN_RANK, 1 << (rank - 1).bit_length())


MIN_RANK = 8
"""Of a slot that lies within a tile."""

PLAIN = ProductShapes(token_multiple=2)
"""Enough for oneDNN's AVX512_BF16 kernels (AMD EPYC): only a product of one row sums in another order."""

BLOCKED = ProductShapes(token_multiple=16, max_rows=32, unsplit_inputs=480, rank_tile=32, min_columns=64)
"""For oneDNN's AMX kernels (Intel Xeon). They add tiles of 32 inputs in order. From 512 inputs on they split the sum,
by the number of rows if these are more than 32, and by the number of columns if these are fewer than 40. Fewer than 16
rows of few inputs are computed without AMX."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x·Wᵀ of `x` [num_rows, in] and `weight` [out, in]."""


def row_blocks(num_rows: int, max_rows: int) -> list[slice]:
    """Consecutive blocks of at most `max_rows` rows."""
    return [slice(start, start + max_rows) for start in range(0, num_rows, max_rows)]


def by_row_blocks(
    multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, shapes: ProductShapes
) -> torch.Tensor:
    """`multiply(x)`, in blocks of rows if these shapes need them."""
    max_rows = shapes.rows_per_product(x.shape[-1])
    if max_rows is None or len(x) <= max_rows:
        return multiply(x)
    return torch.cat([multiply(x[block]) for block in row_blocks(len(x), max_rows)])


def add_by_row_blocks(
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], out: torch.Tensor, x: torch.Tensor, shapes: ProductShapes
) -> torch.Tensor:
    """`add(out, x)`, which adds a product over `x` to `out`, in blocks of rows if these shapes need them."""
    max_rows = shapes.rows_per_product(x.shape[-1])
    if max_rows is None or len(x) <= max_rows:
        return add(out, x)
    return torch.cat([add(out[block], x[block]) for block in row_blocks(len(x), max_rows)])


def product_shapes(like: torch.Tensor) -> ProductShapes:
    """The rules for products in the dtype and on the device of `like`."""
    if like.device.type != "cpu":
        return ProductShapes()
    return (_find_shapes() if like.dtype is torch.bfloat16 else None) or PLAIN


def is_batch_invariant(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our own forward is batch-invariant there. On a GPU and in float32 that is not promised."""
    return device.type == "cpu" and dtype is torch.bfloat16 and _find_shapes() is not None


@cache
def _find_shapes() -> ProductShapes | None:
    """The first rules that the self-check passes with. It takes milliseconds, once a process."""
    shapes = next((shapes for shapes in (PLAIN, BLOCKED) if passes_check(shapes)), None)
    log.info("self-check of the CPU's bfloat16 kernels: %s", shapes or "not batch-invariant in any shapes we know")
    return shapes


WIDTHS = ((576, 1536), (64, 1536), (1152, 896), (576, 480), (64, 480))
"""[out, in] of the check's products: a down projection, a LoRA's A, a fused q, k and v, a LoRA's B, attention over
values. AMX kernels differ in each."""

COMPANY = (4, 33, 64, 256)
"""Rows of the check's batches."""


@torch.inference_mode()
def passes_check(shapes: ProductShapes, multiply: Product = functional.linear) -> bool:
    """Whether a row of products in these shapes has the same bits alone and in batches."""
    draw = torch.Generator().manual_seed(16)
    return all(_is_same_in_batches(shapes, multiply, *_cancelling(*width, draw)) for width in WIDTHS)


def _is_same_in_batches(shapes: ProductShapes, multiply: Product, row: torch.Tensor, weight: torch.Tensor) -> bool:
    def last_row(num_rows: int) -> torch.Tensor:
        padded = max(4, -(-num_rows // shapes.token_multiple) * shapes.token_multiple)
        x = torch.ones(padded, len(row), dtype=row.dtype)
        x[num_rows - 1] = row
        return by_row_blocks(lambda block: multiply(block, weight), x, shapes)[num_rows - 1]

    alone = last_row(1)
    return all(torch.equal(last_row(num_rows), alone) for num_rows in COMPANY)


def _cancelling(num_out: int, num_in: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A row and a weight whose products cancel but for one small term, so that nearly every output shows the order of
    summing."""
    half = torch.randn(num_in // 2, generator=draw)
    columns = torch.randn(num_out, num_in // 2, generator=draw)
    row, weight = torch.cat([half, half]), torch.cat([columns, -columns], 1)
    row[0], row[num_in // 2] = 2**-9, 0
    weight[:, 0] *= 2**-9
    order = torch.randperm(num_in, generator=draw)
    return row[order].bfloat16(), weight[:, order].bfloat16()
