"""Parameters as lines, against brute force: every element in its line, every line in its block."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from titan_adam_mini.check.engines import LAYOUTS
from titan_adam_mini.kernels.lines import Lines, lines_of, not_lines, numbered
from titan_adam_mini.layout import BlockLayout, Tiles
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part
from titan_adam_mini.sharding import box_shape


def check(plan: BlockPlan) -> bool:
    """The lines of one rank hold what they say; False if it has none."""
    lines = lines_of(plan)
    if isinstance(lines, str):
        return False
    layout, box = plan.layout, plan.own[0]
    place = tuple(slice(*interval) for interval in box)
    numbers = torch.arange(prod(layout.shape)).view(layout.shape)[place]
    blocks = torch.zeros(layout.shape, dtype=torch.int64)
    lengths = torch.ones(layout.shape, dtype=torch.int64)
    for dim, (tiles, (start, _), count) in enumerate(zip(layout.dims, plan.reach, plan.grid_shape, strict=True)):
        view = [-1 if other == dim else 1 for other in range(len(layout.shape))]
        base = tiles.tile_of(start) if start < tiles.size else 0
        along = torch.tensor([tiles.tile_of(index) - base for index in range(tiles.size)], dtype=torch.int64)
        size = torch.tensor([tiles.lengths()[tiles.tile_of(index)] for index in range(tiles.size)], dtype=torch.int64)
        blocks = blocks * count + along.view(view)
        lengths = lengths * size.view(view)
    blocks, lengths = blocks[place], lengths[place]

    local = torch.empty(box_shape(box))
    outer, inner, width = lines.strides(local)
    seen = np.zeros(local.numel(), dtype=np.int64)
    sums = prod(plan.sums_shape)
    for one, two, three in itertools.product(*map(range, lines.sizes)):
        at = one * outer + two * inner + three * width
        seen[at] += 1
        line = lines.first + one * lines.reach_inner + two
        block = line // lines.tile if lines.tile else int(np.searchsorted(lines.starts, line, side="right")) - 1
        assert 0 <= block < lines.blocks and block == blocks.reshape(-1)[at]
        assert lines.counts[block if lines.counts.size > 1 else 0] == lengths.reshape(-1)[at]
        assert not plan.axes or not lines.summable or 0 <= line < sums
        if lines.index is not None:
            start, *steps = lines.index
            assert start + one * steps[0] + two * steps[1] + three * steps[2] == numbers.reshape(-1)[at]
    assert (seen == 1).all() and lines.number * lines.sizes[2] == local.numel()
    assert lines.blocks == prod(plan.grid_shape)
    return True


def plans(layout: BlockLayout, mesh: tuple[int, ...], placements: list) -> list[BlockPlan]:
    ranks = itertools.product(*map(range, mesh))
    return [BlockPlan.of(layout, Part.of(layout.shape, placements, mesh, rank)) for rank in ranks]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[BlockLayout, tuple[int, ...], list]:
    """A layout of up to three dims, a mesh of one or two axes, placements."""
    dims = []
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.integers(1, 7))
        kind = draw(st.sampled_from(["unit", "whole", "even", "runs"]))
        if kind == "runs":
            runs = draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=3))
            dims.append(Tiles.of(runs))
        elif kind == "even":
            dims.append(Tiles.of([(draw(st.integers(1, 3)), size)]))
        else:
            dims.append(Tiles.unit(size) if kind == "unit" else Tiles.whole(size))
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3)]))
    choices = [Replicate(), *(Shard(dim) for dim in range(len(dims)))]
    return BlockLayout(tuple(dims)), mesh, [draw(st.sampled_from(choices)) for _ in mesh]


@settings(max_examples=300)
@given(cuts())
def test_lines_of_any_shard_are_what_they_say(case: tuple[BlockLayout, tuple[int, ...], list]) -> None:
    for plan in plans(*case):
        check(plan)


@settings(max_examples=200)
@given(cuts())
@example((BlockLayout.of((4, 3, 5), 2, 1, None), (2,), [Shard(1)]))  # one rank has one tile along dim 1, one has two
def test_what_is_made_of_lines_is_so_on_every_rank(case: tuple[BlockLayout, tuple[int, ...], list]) -> None:
    """Ranks would compute with different engines if it were each one's own to find out."""
    ranks = plans(*case)
    assert len({not_lines(plan) for plan in ranks}) == 1
    assert len({numbered(plan) for plan in ranks}) == 1
    if not_lines(ranks[0]) is None and numbered(ranks[0]):
        assert all(lines_of(plan).index is not None for plan in ranks)


def test_the_layouts_that_models_have_are_lines_on_every_rank() -> None:
    for name, layout in LAYOUTS.items():
        for ranks in (1, 3, 7):
            if prod(layout.shape) > 5_000:
                continue
            for plan in plans(layout, (ranks,), [Shard(0)] if layout.shape else [Replicate()]):
                assert check(plan), (name, ranks, lines_of(plan))


def test_columns_and_rows_lie_as_they_should() -> None:
    rows = lines_of(plans(BlockLayout.of((6, 4), 1, None), (1,), [Replicate()])[0])
    columns = lines_of(plans(BlockLayout.of((6, 4), None, 1), (1,), [Replicate()])[0])
    assert isinstance(rows, Lines) and isinstance(columns, Lines)
    assert rows.strides(torch.empty(6, 4)) == (1, 4, 1) and rows.sizes == (1, 6, 4)
    assert columns.strides(torch.empty(6, 4)) == (1, 1, 4) and columns.sizes == (1, 4, 6)
    assert rows.strides(torch.empty(4, 6).t()) == (1, 1, 6)
