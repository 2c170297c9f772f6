"""Tiles and block layouts against brute force: one tile number written out per index."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_adam_mini.layout import BlockLayout, Tiles

RUNS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=5)


def numbers(runs: list[tuple[int, int]]) -> list[int]:
    """The tile number of every index."""
    out: list[int] = []
    tile = 0
    for count, length in runs:
        for _ in range(count if length else 0):
            out += [tile] * length
            tile += 1
    return out


def pieces(tiles: list[int]) -> list[int]:
    """The lengths of the stretches of equal numbers."""
    return [tiles.count(tile) for tile in sorted(set(tiles))]


@given(RUNS)
def test_runs_are_merged_without_moving_an_edge(runs: list[tuple[int, int]]) -> None:
    tiles, brute = Tiles.of(runs), numbers(runs)
    assert tiles.size == len(brute)
    assert tiles.count == len(set(brute))
    assert tiles.lengths() == pieces(brute)
    assert tiles.starts() == [brute.index(tile) for tile in range(tiles.count)]
    assert [tiles.tile_of(index) for index in range(len(brute))] == brute
    lengths = [length for _, length in tiles.runs]
    assert all(a != b for a, b in pairwise(lengths)), "neighbours of equal length stay apart"
    assert tiles.is_whole == (tiles.count == 1)
    assert tiles.is_unit == (set(lengths) <= {1})
    assert tiles.uniform == (lengths[0] if len(set(lengths)) == 1 and len(lengths) == 1 else None)


@given(RUNS, st.data())
def test_clip_and_span_of_any_range(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    tiles, brute = Tiles.of(runs), numbers(runs)
    start = data.draw(st.integers(0, len(brute)))
    stop = data.draw(st.integers(0, len(brute)))
    inside = brute[start:stop]
    assert tiles.clip(start, stop).lengths() == pieces(inside)
    assert tiles.clip(start, stop) == Tiles.of(tiles.clip(start, stop).runs), "clip gives merged runs"
    assert tiles.span(start, stop) == ((inside[0], inside[-1] + 1) if inside else (0, 0))


@given(RUNS)
def test_every_tile_is_found_only_inside(runs: list[tuple[int, int]]) -> None:
    tiles = Tiles.of(runs)
    with pytest.raises(IndexError, match=f"index {tiles.size} is outside {tiles.size} indices"):
        tiles.tile_of(tiles.size)


def test_named_tiles() -> None:
    assert Tiles.whole(7).lengths() == [7]
    assert Tiles.unit(3).lengths() == [1, 1, 1]
    assert Tiles.whole(0) == Tiles.unit(0) == Tiles(())
    assert Tiles.whole(0).count == 0


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([(32, 128)], "32x128"),
        ([(8, 64), (512, 1)], "8x64+512x1"),
        ([(1, 5), (7, 1)] * 3, "3x(1x5+7x1)"),
        ([], "0"),
    ],
)
def test_how_tiles_read(runs: list[tuple[int, int]], text: str) -> None:
    assert str(Tiles.of(runs)) == text


def test_a_layout_is_one_cut_per_dim() -> None:
    layout = BlockLayout.of((6, 4, 5), 2, [(1, 3), (1, 1)], None)
    assert layout.shape == (6, 4, 5)
    assert layout.grid_shape == (3, 2, 1)
    assert layout.num_blocks == 6
    assert str(layout) == "3x2 * 1x3+1x1 * 1x5"


def test_layouts_of_scalars_and_empty_tensors() -> None:
    scalar = BlockLayout.of(())
    assert (scalar.grid_shape, scalar.num_blocks, str(scalar)) == ((), 1, "scalar")
    empty = BlockLayout.of((0, 3), 4, None)
    assert (empty.shape, empty.grid_shape, empty.num_blocks) == ((0, 3), (0, 1), 0)


@pytest.mark.parametrize("cut", [4, 0, -2])
def test_a_length_that_does_not_divide_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=f"dim 1 of size 6 cannot be cut into tiles of {cut}"):
        BlockLayout.of((2, 6), None, cut)


def test_runs_that_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match="the tiles 2x2 cover 4 indices of dim 0, which has 5"):
        BlockLayout.of((5,), [(2, 2)])
