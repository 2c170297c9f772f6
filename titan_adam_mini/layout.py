"""How one tensor is cut into blocks: tiles along every dim, as integers.

A block is a product of one tile per dim. Rows, heads, columns, experts, full tensors, elementwise
moments and fused projections are all represented by a `BlockLayout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

Run = tuple[int, int]
"""(count, length): `count` consecutive tiles of `length` indices each."""


@dataclass(frozen=True)
class Tiles:
    """Consecutive tiles that cover one dim from index 0, run-length encoded.

    `Tiles(((32, 128),))` are 32 tiles of 128 indices; `Tiles(((8, 64), (512, 1)))` are 8 tiles of 64
    followed by 512 of one index. A dim of size 0 has no runs.
    """

    runs: tuple[Run, ...]

    @staticmethod
    def whole(size: int) -> Tiles:
        """One tile that covers the dim."""
        return Tiles.of([(1, size)])

    @staticmethod
    def unit(size: int) -> Tiles:
        """One tile per index."""
        return Tiles.of([(size, 1)])

    @staticmethod
    def of(runs: Iterable[Run]) -> Tiles:
        """Tiles from runs, neighbouring runs of equal length merged and empty ones dropped."""
        merged: list[Run] = []
        for count, length in runs:
            if count == 0 or length == 0:
                continue
            if merged and merged[-1][1] == length:
                count += merged.pop()[0]
            merged.append((count, length))
        return Tiles(tuple(merged))

    @cached_property
    def size(self) -> int:
        """Number of indices covered."""
        return sum(count * length for count, length in self.runs)

    @cached_property
    def count(self) -> int:
        """Number of tiles."""
        return sum(count for count, _ in self.runs)

    @property
    def is_whole(self) -> bool:
        """One tile covers everything."""
        return self.count == 1

    @property
    def is_unit(self) -> bool:
        """Every tile is one index (also true of an empty dim)."""
        return all(length == 1 for _, length in self.runs)

    @property
    def uniform(self) -> int | None:
        """The length that all tiles share, or None."""
        return self.runs[0][1] if len(self.runs) == 1 else None

    def lengths(self) -> list[int]:
        """The length of every tile, in order."""
        return [length for count, length in self.runs for _ in range(count)]

    def starts(self) -> list[int]:
        """The first index of every tile, in order."""
        return list(accumulate(self.lengths(), initial=0))[:-1]

    def clip(self, start: int, stop: int) -> Tiles:
        """The pieces of the tiles that lie inside [start, stop), re-based to index 0."""
        pieces: list[Run] = []
        offset = 0
        for count, length in self.runs:
            end = offset + count * length
            lo, hi = max(start, offset), min(stop, end)
            if lo < hi:
                first, last = (lo - offset) // length, (hi - 1 - offset) // length
                if first == last:
                    pieces.append((1, hi - lo))
                else:
                    head = offset + (first + 1) * length - lo
                    tail = hi - (offset + last * length)
                    pieces += [(1, head), (last - first - 1, length), (1, tail)]
            offset = end
        return Tiles.of(pieces)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of tile numbers that [start, stop) touches; (0, 0) if it is empty."""
        if start >= stop:
            return 0, 0
        return self.tile_of(start), self.tile_of(stop - 1) + 1

    def tile_of(self, index: int) -> int:
        """The number of the tile that contains `index`."""
        offset = number = 0
        for count, length in self.runs:
            if index < offset + count * length:
                return number + (index - offset) // length
            offset, number = offset + count * length, number + count
        raise IndexError(f"index {index} is outside {self.size} indices")

    def __str__(self) -> str:
        for period in range(1, len(self.runs) // 2 + 1):
            times, rest = divmod(len(self.runs), period)
            if rest == 0 and self.runs[:period] * times == self.runs:
                return f"{times}x({Tiles(self.runs[:period])})"
        return "+".join(f"{count}x{length}" for count, length in self.runs) or "0"


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of one tensor: one `Tiles` per dim, each covering its dim exactly."""

    dims: tuple[Tiles, ...]

    @staticmethod
    def of(shape: Sequence[int], *cuts: int | Iterable[Run] | None) -> BlockLayout:
        """Layout of a tensor of `shape`; one cut per dim: a tile length, runs, or None for one tile.

        Raises ValueError if a dim is not covered exactly.
        """
        assert len(cuts) == len(shape), f"{len(cuts)} cuts for shape {tuple(shape)}"
        dims = []
        for dim, (size, cut) in enumerate(zip(shape, cuts, strict=True)):
            if cut is None:
                tiles = Tiles.whole(size)
            elif isinstance(cut, int):
                if cut < 1 or size % cut:
                    raise ValueError(f"dim {dim} of size {size} cannot be cut into tiles of {cut}")
                tiles = Tiles.of([(size // cut, cut)])
            else:
                tiles = Tiles.of(cut)
                if tiles.size != size:
                    raise ValueError(f"the tiles {tiles} cover {tiles.size} indices of dim {dim}, which has {size}")
            dims.append(tiles)
        return BlockLayout(tuple(dims))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(tiles.size for tiles in self.dims)

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of the block grid: the number of tiles along each dim."""
        return tuple(tiles.count for tiles in self.dims)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, and so of second moments."""
        return prod(self.grid_shape)

    def __str__(self) -> str:
        return " * ".join(str(tiles) for tiles in self.dims) if self.dims else "scalar"
