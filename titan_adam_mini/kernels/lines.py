"""A parameter as lines: the only layout that the fused engines support.

A *line* is a unit that is always summed together: a row of a matrix, an element of a vector, a column of a transposed
weight. The lines of a rank's *reach* (see `plan`) are numbered, a block is a run of consecutive lines, and a rank owns
the lines `first + outer * reach_inner + inner` of it, `width` elements each. All of this is stored as integers, in one
int64 row per parameter of a table that compiled code reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import numpy as np
from torch import Tensor

from ..plan import BlockPlan
from ..sharding import box_shape

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Lines:
    """How this rank's part of one parameter is cut into lines.

    Attributes:
        dims: the dims that number the lines, outer and inner, and those inside a line.
        sizes: the sizes that the rank owns: outer, inner, width.
        first: number, in the reach, of the first own line.
        reach_inner: lines of the reach per outer index.
        blocks: blocks of the reach.
        tile: lines per block if all blocks are alike; 0 if `starts` is used instead.
        starts: int32 [blocks + 1], the first line of every block; empty if all are alike.
        counts: int64 [blocks], elements of every block, over all ranks; one entry if all are alike.
        summable: whether every own line has its own entry among the exchanged sums, or nothing is exchanged.
        fold: sums per block, as `tile`; 1 if sums of blocks are exchanged.
        index: number of the first own element in the flattened global tensor, and its strides along outer, inner and
            width; None if these are not regular.
    """

    dims: tuple[Dims, Dims, Dims]
    sizes: tuple[int, int, int]
    first: int
    reach_inner: int
    blocks: int
    tile: int
    starts: np.ndarray
    counts: np.ndarray
    summable: bool
    fold: int
    index: tuple[int, int, int, int] | None

    @property
    def number(self) -> int:
        """Number of own lines."""
        return self.sizes[0] * self.sizes[1]

    def strides(self, tensor: Tensor) -> tuple[int, int, int] | None:
        """Strides in elements along outer, inner and width; None if they are not regular."""
        merged = [_merged(dims, tuple(tensor.shape), tensor.stride()) for dims in self.dims]
        return None if None in merged else tuple(merged)  # type: ignore[return-value]


def lines_of(plan: BlockPlan) -> Lines | str:
    """The lines of one parameter on one rank, or why it cannot be described by lines on any rank."""
    if (reason := not_lines(plan)) is not None:
        return reason
    own, reach, shape = plan.own[0], plan.reach, plan.layout.shape
    dims = grouped(plan)
    outer, inner, _ = dims
    numbering = outer + inner
    reach_shape, own_shape = box_shape(reach), box_shape(own)

    tile, starts = _tile(plan, numbering)
    blocks = prod(plan.grid_shape)
    lines = prod(reach_shape[dim] for dim in numbering)
    assert blocks in (0, len(starts) - 1 if len(starts) else -(-lines // max(tile, 1)))
    lengths = np.ones((), dtype=np.int64)
    for tiles in plan.reach_tiles:
        size = np.asarray([tiles.uniform] if tiles.uniform else tiles.lengths(), dtype=np.int64)
        lengths = np.multiply.outer(lengths, size)
    counts = lengths.reshape(-1)
    if counts.size not in (1, blocks):
        counts = np.broadcast_to(lengths, plan.grid_shape).reshape(-1)

    sums = prod(plan.sums_shape)
    by_block = bool(plan.axes) and plan.keep < 0
    reach_inner = prod(reach_shape[dim] for dim in inner)
    offsets = [own[dim][0] - reach[dim][0] for dim in range(len(shape))]
    first = 0
    for dim in numbering:
        first = first * reach_shape[dim] + offsets[dim]
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    steps = [_merged(group, own_shape, strides) for group in dims]
    sizes = tuple(prod(own_shape[dim] for dim in group) for group in dims)
    start = sum(lo * stride for (lo, _), stride in zip(own, strides, strict=True))
    return Lines(
        dims=dims,
        sizes=sizes if blocks else (0, 0, 0),  # type: ignore[arg-type]
        first=first,
        reach_inner=reach_inner,
        blocks=blocks,
        tile=tile,
        starts=starts,
        counts=np.ascontiguousarray(counts),
        summable=not plan.axes or sums == prod(reach_shape[dim] for dim in numbering),
        fold=1 if by_block else tile,
        index=None if None in steps else (start, *steps),  # type: ignore[arg-type]
    )


def not_lines(plan: BlockPlan) -> str | None:
    """Why a parameter cannot be described by lines; None if it can, on every rank of its mesh.

    This depends on the layout and the cuts of the mesh, not on which part this rank has.
    """
    if plan.shard.flat is not None:
        return "it is a slice of a flattened tensor"
    outer, inner, _ = grouped(plan)
    numbering, tiles = outer + inner, plan.layout.dims
    # Blocks are runs of lines if all dims after the first with tiles longer than 1 are whole in every reach.
    long = next((place for place, dim in enumerate(numbering) if not tiles[dim].is_unit), len(numbering))
    if any(_largest(plan, dim, plan.levels[dim], tiles[dim].count) > 1 for dim in numbering[long + 1 :]):
        return "its blocks are not runs of rows"
    for group in (outer, inner):
        longer = [dim for dim in group if _largest(plan, dim, plan.levels[dim], tiles[dim].size) > 1]
        if any(plan.shard.cuts_of(dim)[plan.levels[dim] :] for dim in longer[1:]):
            return "its rows are cut in the middle"
    return None


def numbered(plan: BlockPlan) -> bool:
    """Whether the lines of every rank have an `index`."""
    shape = plan.layout.shape
    most = tuple(_largest(plan, dim, None, size) for dim, size in enumerate(shape))
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return all(_merged(group, most, strides) is not None for group in grouped(plan))


def _largest(plan: BlockPlan, dim: int, levels: int | None, size: int) -> int:
    """The largest share of `size` indices, or tiles, of a dim after its outer `levels` cuts, or after all."""
    for cut in plan.shard.cuts_of(dim)[:levels]:
        size = -(-size // cut.size)
    return size


def grouped(plan: BlockPlan) -> tuple[Dims, Dims, Dims]:
    """Which dims number the lines (outer, inner) and which are inside a line."""
    dims = tuple(range(len(plan.layout.shape)))
    whole = [tiles.is_whole for tiles in plan.layout.dims]
    if plan.axes and plan.keep >= 0:
        cut = plan.keep + 1  # row sums are exchanged: those are the lines
    else:
        # From the first dim after which all are whole; dim 0 always numbers lines, since FSDP cuts there.
        cut = max(1, next(dim for dim in range(len(dims) + 1) if all(whole[dim:])))
    before = [dim for dim in dims[:-1] if whole[dim] and plan.layout.shape[dim] > 1]
    if cut >= len(dims) > 1 and before and not (plan.axes and plan.keep >= 0):
        # A transposed weight: a line is a column.
        run = [dim for dim in before if all(other in before for other in range(before[0], dim + 1))]
        return dims[: run[0]], dims[run[-1] + 1 :], tuple(run)
    numbering = dims[:cut]
    return numbering[:-1], numbering[-1:], dims[cut:]


def _tile(plan: BlockPlan, numbering: Dims) -> tuple[int, np.ndarray]:
    """Lines per block, or 0 and the first line of every block if they differ."""
    nothing = np.empty(0, dtype=np.int32)
    tiles = [plan.reach_tiles[dim] for dim in numbering]
    if all(dim_tiles.is_unit for dim_tiles in tiles):
        return 1, nothing
    if all(dim_tiles.is_whole for dim_tiles in tiles):
        return max(1, prod(dim_tiles.size for dim_tiles in tiles)), nothing
    long = next(place for place, dim_tiles in enumerate(tiles) if not dim_tiles.is_unit)
    behind = prod(dim_tiles.size for dim_tiles in tiles[long + 1 :])
    if tiles[long].uniform is not None:
        return tiles[long].uniform * behind, nothing  # type: ignore[operator]
    lengths = tiles[long].lengths() * prod(dim_tiles.size for dim_tiles in tiles[:long])
    return 0, np.asarray(list(accumulate((length * behind for length in lengths), initial=0)), dtype=np.int32)


def _merged(dims: Dims, sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride of several dims merged into one; None if they are not adjacent in memory."""
    dims = tuple(dim for dim in dims if sizes[dim] != 1)
    if not dims or any(sizes[dim] == 0 for dim in dims):
        return 1
    regular = all(strides[outer] == sizes[inner] * strides[inner] for outer, inner in pairwise(dims))
    return strides[dims[-1]] if regular else None
