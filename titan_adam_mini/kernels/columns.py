"""Second moments of the columns of a matrix, by themselves or factored: those of rows times those of columns.

An element's factored second moment is that of its row times that of its column over that of the whole, as Adafactor
keeps them (arXiv 1804.04235, section 3). Rows and the whole are blocks of whole rows like any others. Columns are not:
FSDP cuts between the rows of a column, and floating-point sums over parts of it depend on where. So squares are
rounded, before they are added, to multiples of a quantum that all ranks know: 2**-36 of what the state expects of the
column's sum, rounded up to a power of two. In float64 such multiples add without rounding, in any order, until a sum is
2**17 times what was expected; what is lost is nothing beside the state that the sum is averaged into. In the first
step, and where the state is 0, nothing is expected: sums are plain float64 there, which may differ in the 53rd bit,
where float32 keeps 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import Factor, ParamStep, vectorized

BITS = 36
LEAST_BETA2 = 0.5
ROWS, COLUMNS, WHOLE = range(3)
"""What a grid of second moments is of."""


def grids(work: ParamStep) -> list[tuple[int, ParamStep | Factor]]:
    """The grids of a work whose columns have second moments, and what each is of."""
    return list(enumerate((work, *work.factors))) if work.factors else [(COLUMNS, work)]


def column_grid(work: ParamStep) -> ParamStep | Factor:
    """The grid of a work's columns."""
    return work.factors[0] if work.factors else work


def take_squares(work: ParamStep, square_sums: Callable[..., Tensor]) -> None:
    """Put the sums of squares of this rank's rows and columns into `work.squares`.

    Args:
        square_sums: that of an `Arithmetic`, for the rows.
    """
    assert work.grad is not None
    offset = rounding_offset(work)
    found = []
    for view, (tiles, _, _), (_, _, blocks) in zip(
        work.plan.shard.views(work.grad), work.plan.parts, column_grid(work).plan.parts, strict=True
    ):
        rows = view.new_zeros((*view.shape[:-1], 1), dtype=work.exp_avg_sq.dtype)
        if work.factors and view.numel():
            rows = square_sums(view, tiles, view.ndim - 2, rows.dtype)
        found.append((rows, column_sums(view, None if offset is None else offset[blocks])))
    work.squares = found


def column_sums(view: Tensor, offset: Tensor | None) -> Tensor:
    """Sums of squares over the rows of a matrix, or of each of a stack, float64; see `rounding_offset`."""
    sums = view.new_zeros((*view.shape[:-2], 1, view.shape[-1]), dtype=torch.float64)
    for rows in vectorized.chunks(view):
        squares = view[rows].to(torch.float64).square()
        if offset is not None:
            here = offset[rows if offset.shape[0] > 1 else ...]
            squares.add_(here).sub_(here)
        sums[rows if sums.shape[0] > 1 else ...] += squares.sum(-2, keepdim=True)
    return sums


def rounding_offset(work: ParamStep) -> Tensor | None:
    """What to add to a square and take away again, to round it to multiples of its column's quantum: float64, of the
    shape of the columns' grid, 0 where nothing is known. None where nothing is rounded: for float64 parameters, and
    where the state is forgotten so fast that it says nothing of what is lost beside it."""
    columns, beta2 = column_grid(work), float(work.group["betas"][1])
    if columns.exp_avg_sq.dtype == torch.float64 or beta2 < LEAST_BETA2:
        return None
    number = prod(tiles.size for tiles in columns.plan.layout.dims if tiles.is_whole)
    step = work.step.to(torch.float64)
    expected = columns.exp_avg_sq.to(torch.float64) * (number / (1 - beta2**step))
    exponent = torch.frexp(expected)[1]
    # float64 has 53 bits: next to 1.5 * 2**52 quanta, its neighbours are one quantum apart.
    quanta = 1.5 * torch.exp2((exponent + (52 - BITS)).to(torch.float64))
    return torch.where((expected > 0) & (step >= 1), quanta, 0.0)


def share(works: Sequence[ParamStep]) -> None:
    """Add this rank's sums to what is exchanged."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for work in works:
        for kind, grid in grids(work):
            pairs += [] if grid.own_sums is None else _pairs(work, kind, grid, grid.own_sums)
    if pairs:
        torch._foreach_add_([target for target, _ in pairs], [part for _, part in pairs])


def gathered(work: ParamStep, kind: int, grid: ParamStep | Factor) -> Tensor:
    """The sums of a grid, complete: from the exchange, or this rank's where nobody else has any."""
    dtype = torch.float64 if kind == COLUMNS else work.exp_avg_sq.dtype
    if grid.sums is not None:
        return grid.sums.to(dtype)
    sums = torch.zeros(grid.plan.sums_shape, dtype=dtype, device=work.param.device)
    if work.squares is not None:
        for target, part in _pairs(work, kind, grid, sums):
            target += part
    return sums


def _pairs(work: ParamStep, kind: int, grid: ParamStep | Factor, sums: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Where to add this rank's part of a grid in `sums`, of its plan's `sums_shape`, and what."""
    assert work.squares is not None
    for (rows, columns), (tiles, place, _) in zip(work.squares, grid.plan.parts, strict=True):
        part = columns if kind == COLUMNS else rows
        if not part.numel():
            continue
        summed = range(part.ndim - 2, grid.plan.keep, -1) if kind == WHOLE else ()
        if summed:
            part = part.clone()  # sums overwrite what they add
        for dim in summed:
            part = vectorized.sum_tiles(part, tiles[dim], dim)
        yield sums[place], part.to(sums.dtype)


def roots(work: ParamStep, correction: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Per owned box, of its rows and of its columns, what multiplied is the root of an element's second moment.

    Args:
        correction: 1 - beta2^t, a number or 0-d.
    """
    moments = [(grid.exp_avg_sq, grid.plan.parts) for _, grid in grids(work)]
    for view, *parts in zip(work.plan.shard.views(work.param), *(parts for _, parts in moments), strict=True):
        found = [grid[part[2]] for (grid, _), part in zip(moments, parts, strict=True)]
        if work.factors:
            rows, columns = _over(found[ROWS], found[WHOLE]).sqrt_(), found[COLUMNS]
        else:
            rows, (columns,) = view.new_ones((*view.shape[:-1], 1), dtype=work.exp_avg_sq.dtype), found
        yield rows, (columns / correction).sqrt_()


def product(rows: Tensor, columns: Tensor, whole: Tensor) -> Tensor:
    """Second moments of elements, from the means of their rows and columns and of the whole, which broadcast."""
    return _over(rows, whole) * columns


def _over(rows: Tensor, whole: Tensor) -> Tensor:
    """A row's share; 0 where there was no gradient ever.

    Where the whole is not finite nothing is known of any element: NaN, and not the zeros that rows / infinity are.
    """
    share = torch.where(whole == 0, 0.0, rows / whole)
    return torch.where(whole.isfinite(), share, torch.nan)
