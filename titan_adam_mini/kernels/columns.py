"""Second moments of the columns of a matrix, alone or factored (rows times columns).

An element's factored second moment is that of its row times that of its column divided by that of the full matrix, as
in Adafactor (arXiv 1804.04235, section 3). Rows and the full matrix are blocks of full rows like any others. Columns
are not: FSDP cuts between the rows of a column, and floating-point sums over parts of it depend on where. Therefore
squares are rounded, before they are added, to multiples of a quantum that all ranks know: 2**-36 of the column's sum
that the state predicts, rounded up to a power of two. In float64 such multiples add without rounding, in any order,
until a sum is 2**17 times the predicted one; the rounding error is negligible compared with the state into which the
sum is averaged. In the first step, and where the state is 0, there is no prediction: sums are plain float64 there and
may differ in the 53rd bit, of which float32 keeps 24.
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
"""What the entries of a grid of second moments stand for."""


def grids(param_step: ParamStep) -> list[tuple[int, ParamStep | Factor]]:
    """(kind, grid) of every grid of a parameter whose columns have second moments."""
    return list(enumerate((param_step, *param_step.factors))) if param_step.factors else [(COLUMNS, param_step)]


def column_grid(param_step: ParamStep) -> ParamStep | Factor:
    """The grid of a parameter's columns."""
    return param_step.factors[0] if param_step.factors else param_step


def compute_squares(param_step: ParamStep, square_sums: Callable[..., Tensor]) -> None:
    """Store the sums of squares of this rank's rows and columns in `param_step.squares`.

    Args:
        square_sums: from an `Arithmetic`, for the rows.
    """
    assert param_step.grad is not None
    offset = rounding_offset(param_step)
    found = []
    for view, (tiles, _, _), (_, _, blocks) in zip(
        param_step.plan.shard.views(param_step.grad),
        param_step.plan.parts,
        column_grid(param_step).plan.parts,
        strict=True,
    ):
        rows = view.new_zeros((*view.shape[:-1], 1), dtype=param_step.exp_avg_sq.dtype)
        if param_step.factors and view.numel():
            rows = square_sums(view, tiles, view.ndim - 2, rows.dtype)
        found.append((rows, column_sums(view, None if offset is None else offset[blocks])))
    param_step.squares = found


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


def rounding_offset(param_step: ParamStep) -> Tensor | None:
    """The number to add to a square and subtract again, to round it to multiples of its column's quantum: float64, of
    the shape of the columns' grid, 0 where there is no prediction. None if nothing is rounded: for float64 parameters,
    and if beta2 is so small that the state does not bound the rounding error."""
    columns, beta2 = column_grid(param_step), float(param_step.group["betas"][1])
    if columns.exp_avg_sq.dtype == torch.float64 or beta2 < LEAST_BETA2:
        return None
    number = prod(tiles.size for tiles in columns.plan.layout.dims if tiles.is_whole)
    step = param_step.step.to(torch.float64)
    expected = columns.exp_avg_sq.to(torch.float64) * (number / (1 - beta2**step))
    exponent = torch.frexp(expected)[1]
    # float64 has 53 bits: next to 1.5 * 2**52 quanta, its neighbours are one quantum apart.
    quanta = 1.5 * torch.exp2((exponent + (52 - BITS)).to(torch.float64))
    return torch.where((expected > 0) & (step >= 1), quanta, 0.0)


def add_to_exchange(param_steps: Sequence[ParamStep]) -> None:
    """Add this rank's sums to the exchange buffers."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for param_step in param_steps:
        for kind, grid in grids(param_step):
            pairs += [] if grid.own_sums is None else _pairs(param_step, kind, grid, grid.own_sums)
    if pairs:
        torch._foreach_add_([target for target, _ in pairs], [part for _, part in pairs])


def complete_sums(param_step: ParamStep, kind: int, grid: ParamStep | Factor) -> Tensor:
    """The complete sums of a grid: from the exchange, or this rank's if it has the full tensor."""
    dtype = torch.float64 if kind == COLUMNS else param_step.exp_avg_sq.dtype
    if grid.sums is not None:
        return grid.sums.to(dtype)
    sums = torch.zeros(grid.plan.sums_shape, dtype=dtype, device=param_step.param.device)
    if param_step.squares is not None:
        for target, part in _pairs(param_step, kind, grid, sums):
            target += part
    return sums


def _pairs(param_step: ParamStep, kind: int, grid: ParamStep | Factor, sums: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(target, part): views of `sums`, of the plan's `sums_shape`, and this rank's sums to add to them."""
    assert param_step.squares is not None
    for (rows, columns), (tiles, place, _) in zip(param_step.squares, grid.plan.parts, strict=True):
        part = columns if kind == COLUMNS else rows
        if not part.numel():
            continue
        summed = range(part.ndim - 2, grid.plan.keep, -1) if kind == WHOLE else ()
        if summed:
            part = part.clone()  # sums overwrite what they add
        for dim in summed:
            part = vectorized.sum_tiles(part, tiles[dim], dim)
        yield sums[place], part.to(sums.dtype)


def roots(param_step: ParamStep, correction: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Per owned box, factors of its rows and columns whose product is the root of an element's second moment.

    Args:
        correction: 1 - beta2^t, a number or 0-d.
    """
    moments = [(grid.exp_avg_sq, grid.plan.parts) for _, grid in grids(param_step)]
    for view, *parts in zip(
        param_step.plan.shard.views(param_step.param), *(parts for _, parts in moments), strict=True
    ):
        found = [grid[part[2]] for (grid, _), part in zip(moments, parts, strict=True)]
        if param_step.factors:
            rows, columns = _row_share(found[ROWS], found[WHOLE]).sqrt_(), found[COLUMNS]
        else:
            rows, (columns,) = view.new_ones((*view.shape[:-1], 1), dtype=param_step.exp_avg_sq.dtype), found
        yield rows, (columns / correction).sqrt_()


def product(rows: Tensor, columns: Tensor, whole: Tensor) -> Tensor:
    """Second moments of elements, from the means of rows, columns and the full matrix, which broadcast."""
    return _row_share(rows, whole) * columns


def _row_share(rows: Tensor, whole: Tensor) -> Tensor:
    """rows / whole; 0 where there has never been a gradient.

    NaN where `whole` is not finite, instead of the zeros that rows / infinity would give.
    """
    share = torch.where(whole == 0, 0.0, rows / whole)
    return torch.where(whole.isfinite(), share, torch.nan)
