"""Which blocks lie on more than one rank, and the small buffers that complete them: pure data, no process group.

Four terms: A rank *owns* a box of a tensor. Along each dim the outermost cuts may be *aligned* with the blocks
(every rank then has complete tiles, exactly those that torch would assign to it when sharding the block grid);
from the first cut that is not, the blocks *straddle*. The *reach* of a rank is the box it would own if only the
aligned cuts were made: the blocks whose second moments it stores. Every rank of a group along a straddling axis
has the same reach, so that group reduces the sums of the reach, in buffers of equal shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import prod

from .layout import BlockLayout, Tiles
from .sharding import Axis, Box, Shard, box_shape, chunk

Group = tuple[int, ...]
"""A process group, identified by its ranks."""


@dataclass(frozen=True)
class BlockPlan:
    """One parameter's blocks on one rank.

    Attributes:
        layout: how the global tensor is cut into blocks.
        shard: this rank's part of it.
        levels: per dim, how many of its cuts (outer first) are aligned with the blocks.
        keep: dims up to this one are exchanged per index ("row sums"), later ones are summed over their tiles
            first; -1 exchanges one partial sum per block. Rows go into disjoint slots, so their all-reduce
            only adds zeros, and every rank then adds the rows in the order of a single device: bit-identical.
        axes: mesh axes whose groups complete the sums, in mesh order; empty if nothing straddles.
    """

    layout: BlockLayout
    shard: Shard
    levels: tuple[int, ...]
    keep: int
    axes: tuple[int, ...]

    @staticmethod
    def of(layout: BlockLayout, shard: Shard) -> BlockPlan:
        """Plan the blocks of one parameter for one rank."""
        assert layout.shape == shard.shape, f"layout for {layout.shape}, shard of {shard.shape}"
        dims = range(len(shard.shape))
        if shard.flat is not None:
            keep = 0 if len(shard.shape) == 1 else -1
            return BlockPlan(layout, shard, (0,) * len(shard.shape), keep, (shard.flat[2],))
        cuts = [shard.cuts_of(dim) for dim in dims]
        levels = tuple(_aligned_levels(layout.dims[dim], tuple(cut.size for cut in cuts[dim])) for dim in dims)
        straddling = [cut for dim in dims for cut in cuts[dim][levels[dim] :]]
        deepest = max((cut.dim for cut in straddling), default=-1)
        whole_rows = all(tiles.is_whole for tiles in layout.dims[deepest + 1 :])
        across_rows = deepest == len(shard.shape) - 1 and deepest > 0
        keep = deepest if whole_rows and not across_rows else -1
        return BlockPlan(layout, shard, levels, keep, tuple(sorted(cut.axis for cut in straddling)))

    @cached_property
    def own(self) -> tuple[Box, ...]:
        """The boxes of the tensor that this rank owns."""
        return self.shard.boxes()

    @cached_property
    def reach(self) -> Box:
        """The box of the tensor whose second moments this rank stores: complete blocks."""
        return self.shard.box(self.levels)

    @cached_property
    def reach_tiles(self) -> tuple[Tiles, ...]:
        """The tiles of the reach, per dim."""
        return self.tiles_in(self.reach)

    def tiles_in(self, box: Box) -> tuple[Tiles, ...]:
        """The pieces of tiles inside a box, per dim."""
        return tuple(tiles.clip(*interval) for tiles, interval in zip(self.layout.dims, box, strict=True))

    @cached_property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part of the block grid."""
        return tuple(tiles.count for tiles in self.reach_tiles)

    @cached_property
    def sums_shape(self) -> tuple[int, ...]:
        """Shape of the exchanged sums of the reach."""
        rows = box_shape(self.reach)[: self.keep + 1]
        return rows + self.grid_shape[self.keep + 1 :]

    @cached_property
    def parts(self) -> tuple[tuple[tuple[Tiles, ...], tuple[slice, ...], tuple[slice, ...]], ...]:
        """Per owned box: the pieces of its tiles, the slices of its sums among those of the reach, and of its
        blocks."""
        return tuple((self.tiles_in(box), self.place(box), self.blocks_of(box)) for box in self.own)

    def place(self, box: Box) -> tuple[slice, ...]:
        """The slices of an owned box's sums among the sums of the reach."""
        slices = []
        for dim, ((start, stop), (base, _)) in enumerate(zip(box, self.reach, strict=True)):
            lo, hi = start - base, stop - base
            slices.append(slice(lo, hi) if dim <= self.keep else slice(*self.reach_tiles[dim].span(lo, hi)))
        return tuple(slices)

    def blocks_of(self, box: Box) -> tuple[slice, ...]:
        """The slices of an owned box's blocks in this rank's part of the grid."""
        return tuple(
            slice(*tiles.span(start - base, stop - base))
            for tiles, (start, stop), (base, _) in zip(self.reach_tiles, box, self.reach, strict=True)
        )

    @cached_property
    def of_columns(self) -> bool:
        """Whether the blocks are the columns of a matrix, or of each matrix of a stack."""
        if len(self.layout.shape) < 2:
            return False
        *stack, rows, columns = self.layout.dims
        return (
            all(tiles.is_unit for tiles in stack)
            and rows.is_whole
            and columns.is_unit
            and 1 not in (rows.size, columns.size)
        )

    @cached_property
    def of_rows(self) -> BlockPlan:
        """The plan of the same shard with one block per row."""
        shape = self.layout.shape
        return BlockPlan.of(BlockLayout.of(shape, *(1 for _ in shape[1:]), None), self.shard)

    @property
    def aligned_axes(self) -> frozenset[int]:
        """The mesh axes along which the block grid is sharded like the parameter."""
        return frozenset(cut.axis for cut in self.shard.cuts) - frozenset(self.axes)


@cache
def _aligned_levels(tiles: Tiles, sizes: tuple[int, ...]) -> int:
    """How many of the nested cuts into `sizes` chunks (outer first) give every rank the tiles that torch would give it
    when sharding the grid."""
    pieces = {tiles}
    for level, size in enumerate(sizes):
        if not all(_is_aligned(piece, size) for piece in pieces):
            return level
        pieces = {piece.clip(*chunk(piece.size, size, index)) for piece in pieces for index in range(size)}
    return len(sizes)


@cache
def _is_aligned(tiles: Tiles, chunks: int) -> bool:
    """Whether `chunks` chunks of the indices contain exactly the tiles of as many chunks of the list of tiles."""
    if tiles.is_unit:
        return True
    edges = [*tiles.starts(), tiles.size]
    return all(
        edges[tile] == index
        for number in range(chunks)
        for tile, index in zip(chunk(tiles.count, chunks, number), chunk(tiles.size, chunks, number), strict=True)
    )


@dataclass(frozen=True)
class Grid:
    """One block grid among all that an optimizer exchanges.

    Attributes:
        param: index of its parameter.
        plan: its blocks on this rank.
    """

    param: int
    plan: BlockPlan

    @property
    def float64(self) -> bool:
        """Whether its sums are exchanged as float64. Sums over a column add many rows in an order that depends on the
        sharding: in float64 the rounding errors are zero or far below those of float32."""
        return self.plan.of_columns


def grids_of(plans: Sequence[Sequence[BlockPlan]]) -> list[Grid]:
    """The grids of all parameters, in the order of the exchange; `plans` has those of every parameter."""
    return [Grid(param, plan) for param, own in enumerate(plans) for plan in own]


@dataclass(frozen=True)
class Slot:
    """One block grid's place in one group's buffer.

    Attributes:
        grid: its index.
        sums: offset of its sums, which have the plan's `sums_shape`; None if they are not exchanged here.
        float64: whether they are in the buffer's float64 part.
        present: offset of the number of ranks that have a gradient; never in the float64 part.
        after: index, in the list of buffers, of the one whose result is copied into this one; None for the first.
        present_after: the same for the number of ranks.
    """

    grid: int
    sums: int | None
    float64: bool
    present: int
    after: int | None
    present_after: int | None


@dataclass(frozen=True)
class BufferPlan:
    """One group's buffer, the same on all ranks of the group: `numel` entries, and `float64_numel` that are float64."""

    group: Group
    slots: tuple[Slot, ...]
    numel: int
    float64_numel: int


def plan_buffers(grids: Sequence[Grid], axes: Sequence[Sequence[Axis]]) -> tuple[BufferPlan, ...]:
    """The exchange of all block grids of an optimizer: one buffer per group with straddling blocks.

    Args:
        grids: see `grids_of`; all ranks have the same order.
        axes: of every parameter, the axes (of more than one rank) of its mesh.

    The order of the buffers is the same on all ranks: by position in the mesh, since a block cut on two axes is
    reduced on each in turn, then by ranks. If a group exchanges at all, it also counts the ranks that have a gradient
    for every parameter that it shards, so that `step` stays the same everywhere.
    """
    busy = {axis.ranks for grid in grids for axis in axes[grid.param] if axis.index in grid.plan.axes}
    order = {group: number for number, group in enumerate(ordered_groups(axes)) if group in busy}
    members: dict[Group, list[tuple[int, bool]]] = {group: [] for group in order}
    for index, grid in enumerate(grids):
        cut = {axis_cut.axis for axis_cut in grid.plan.shard.cuts} | set(grid.plan.axes)
        for axis in axes[grid.param]:
            if axis.ranks in busy and axis.index in cut:
                members[axis.ranks].append((index, axis.index in grid.plan.axes))

    buffers: list[BufferPlan] = []
    sums_in: dict[int, int] = {}
    present_in: dict[int, int] = {}
    for group in order:
        slots, ends = [], [0, 0]
        for index, exchanged in members[group]:
            sums, after, part = None, None, int(grids[index].float64)
            if exchanged:
                sums, after = ends[part], sums_in.get(index)
                ends[part] += prod(grids[index].plan.sums_shape)
                sums_in[index] = len(buffers)
            slots.append(Slot(index, sums, grids[index].float64, ends[0], after, present_in.get(index)))
            ends[0] += 1
            present_in[index] = len(buffers)
        buffers.append(BufferPlan(group, tuple(slots), *ends))
    return tuple(buffers)


def bytes_in(buffers: Sequence[BufferPlan], grids: Sequence[Grid], itemsizes: Sequence[int]) -> dict[int, int]:
    """Bytes of each parameter in the buffers, presence slots included; parameters without any are left out.

    Args:
        itemsizes: of every parameter; a buffer is exchanged in the widest dtype of its parameters.
    """
    result: dict[int, int] = {}
    for buffer in buffers:
        own = [grids[slot.grid] for slot in buffer.slots]
        wide = max([8 if buffer.float64_numel else 0, *(itemsizes[grid.param] for grid in own)])
        for slot, grid in zip(buffer.slots, own, strict=True):
            numel = 1 + (prod(grid.plan.sums_shape) if slot.sums is not None else 0)
            result[grid.param] = result.get(grid.param, 0) + numel * wide
    return result


def ordered_groups(axes: Sequence[Sequence[Axis]]) -> list[Group]:
    """All groups of the parameters' meshes in the same order on all ranks: mesh order first, then ranks.

    Raises ValueError if two meshes have the same two groups in opposite order.
    """
    meshes = {tuple(mesh) for mesh in axes}
    stage = {axis.ranks: 0 for mesh in meshes for axis in mesh}
    steps = {(outer.ranks, inner.ranks) for mesh in meshes for outer, inner in pairwise(mesh)}
    for _ in range(len(stage) + 1):
        late = [(outer, inner) for outer, inner in steps if stage[inner] <= stage[outer]]
        if not late:
            return sorted(stage, key=lambda ranks: (stage[ranks], ranks))
        for outer, inner in late:
            stage[inner] = stage[outer] + 1
    raise ValueError(
        f"ranks {late[0][0]} come before {late[0][1]} in one device mesh and after them in another; "
        "use the same order of axes in all meshes"
    )
