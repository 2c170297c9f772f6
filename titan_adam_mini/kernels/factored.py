"""Factored second moments: an element's is that of its row times that of its column over that of the whole.

As Adafactor keeps them (arXiv 1804.04235, section 3), for a matrix or for each of a stack of them. The grids of rows
and of the whole are blocks of whole rows like any others. The columns are not: FSDP cuts between the rows of a column,
and floating-point sums over parts of it depend on where. So squares are rounded, before they are added, to multiples
of a quantum that all ranks know: 2**-36 of what the state expects of the column's sum, rounded up to a power of two.
In float64 such multiples add without rounding, in any order, until a sum is 2**17 times what was expected; what is lost
is nothing beside the state that the sum is averaged into. In the first step, and where the state is 0, nothing is
expected: sums are plain float64 there, which may differ in the 53rd bit, where float32 keeps 24.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from . import Factor, Work, vectorized

BITS = 36
LEAST_BETA2 = 0.5


def add_sums(columns: Factor, work: Work, sums: Tensor) -> None:
    """Add the sums of squares of this rank's part of `work` to `sums`, float64 [columns.plan.sums_shape]."""
    assert work.grad is not None
    plan, around = columns.plan, _magic(columns, work)
    summed = [dim for dim, tiles in enumerate(plan.layout.dims) if tiles.is_whole and dim > plan.keep]
    for view, (_, place, blocks) in zip(plan.shard.views(work.grad), plan.parts, strict=True):
        magic = None if around is None else around[blocks]
        for rows in vectorized.chunks(view):
            squares = view[rows].to(torch.float64).square()
            here = rows if magic is None or magic.shape[0] > 1 else ...
            if magic is not None:
                squares.add_(magic[here]).sub_(magic[here])
            into = sums[place]
            into[rows if into.shape[0] > 1 else ...] += squares.sum(summed, keepdim=True)


def _magic(columns: Factor, work: Work) -> Tensor | None:
    """What to add to a square and take away again, to round it to multiples of its column's quantum; float64, of the
    shape of the columns' grid. None where nothing is rounded: in the first step, for float64 parameters, and where the
    state is forgotten so fast that it says nothing of what is lost beside it."""
    step, beta2 = float(work.step), float(work.group["betas"][1])
    if step < 1 or columns.exp_avg_sq.dtype == torch.float64 or beta2 < LEAST_BETA2:
        return None
    number = prod(tiles.size for tiles in columns.plan.layout.dims if tiles.is_whole)
    expected = columns.exp_avg_sq.to(torch.float64) * (number / (1 - beta2**step))
    exponent = torch.frexp(expected)[1]
    # float64 has 53 bits: next to 1.5 * 2**52 quanta, its neighbours are one quantum apart.
    return torch.where(expected > 0, 1.5 * torch.exp2((exponent + (52 - BITS)).to(torch.float64)), 0.0)


def product(rows: Tensor, columns: Tensor, whole: Tensor) -> Tensor:
    """Row mean times column mean over the mean of the whole, which broadcast; 0 where there was no gradient ever.

    Where the whole is not finite nothing is known of any element: NaN, and not the zeros that rows / infinity are.
    """
    ratio = torch.where(whole == 0, 0.0, rows / whole)
    return torch.where(whole.isfinite(), ratio, torch.nan) * columns


def products(work: Work, number: int) -> Iterator[tuple[slice | tuple[()], Tensor]]:
    """The second moments of box `number` of what this rank holds, some rows at a time: (rows, their second moments)."""
    grids = [(work.exp_avg_sq, work.plan), *((factor.exp_avg_sq, factor.plan) for factor in work.factors)]
    parts = [grid[plan.parts[number][2]] for grid, plan in grids]
    shape = tuple(stop - start for start, stop in work.plan.own[number])
    for rows in vectorized.chunks(work.param.new_empty(()).expand(shape)):
        yield rows, product(*(part[rows if part.shape[0] > 1 else ...] for part in parts))
