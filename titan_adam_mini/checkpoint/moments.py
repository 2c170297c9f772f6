"""Second moments of unsharded tensors: block means of elementwise ones, and block means expanded to elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import vectorized
from ..kernels.columns import product
from ..kernels.tensorwise import Tensorwise
from ..layout import BlockLayout, Tiles
from ..plan import BlockPlan
from ..sharding import Shard


def block_means(exp_avg_sq: Tensor, layouts: Sequence[BlockLayout]) -> tuple[Tensor, list[Tensor]]:
    """AdamW's second moments of a tensor as roots, and their means per block for every layout, float32 or float64.

    As roots, because the engine, whose order of summation is used, sums squares.
    """
    roots = exp_avg_sq.to(torch.float64 if exp_avg_sq.dtype == torch.float64 else torch.float32).sqrt()
    plain, means = Tensorwise("foreach", vectorized), []
    for layout in layouts:
        plan = BlockPlan.of(layout, Shard(tuple(roots.shape)))
        if plan.of_columns:  # in float64, as in a step
            summed = [dim for dim, tiles in enumerate(layout.dims) if tiles.is_whole]
            means.append(roots.to(torch.float64).square().mean(summed, keepdim=True).to(roots.dtype))
            continue
        sums = roots.new_zeros(plan.sums_shape)
        plain.add_sums(plan, roots, sums)
        means.append(plain.means(plan, sums))
    return roots, means


def spread(grids: Sequence[Tensor], layouts: Sequence[BlockLayout], box: Sequence[tuple[int, int]]) -> Tensor:
    """The second moment of every element of `box`: that of its block, or combined from row, column and matrix mean."""
    parts = [_spread(grid, layout, box) for grid, layout in zip(grids, layouts, strict=True)]
    return parts[0] if len(parts) == 1 else product(*parts)


def _spread(grid: Tensor, layout: BlockLayout, box: Sequence[tuple[int, int]]) -> Tensor:
    for dim, (tiles, (start, stop)) in enumerate(zip(layout.dims, box, strict=True)):
        grid = grid.index_select(dim, _tiles_of(tiles, start, stop)) if not tiles.is_whole else grid
    return grid.expand([stop - start for start, stop in box])


def _tiles_of(tiles: Tiles, start: int, stop: int) -> Tensor:
    """The tile number of every index in [start, stop)."""
    first, last = tiles.span(start, stop)
    lengths = torch.tensor(tiles.clip(start, stop).lengths(), dtype=torch.int64)
    return torch.arange(first, last).repeat_interleave(lengths)
