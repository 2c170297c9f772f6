"""A step's arithmetic in whole-tensor torch operations: any device, no per-element index, little memory.

Bit-identical to the reference: same order of summation, and every operation is a single IEEE one (no fused
multiply-add, whose use would depend on an element's position).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..layout import Tiles

CHUNK, GPU_CHUNK = 1 << 18, 1 << 24
"""Elements processed at a time, which bounds temporaries: they fit a CPU's cache, or are worth a GPU launch."""


def square_sums(grad: Tensor, tiles: tuple[Tiles, ...], keep: int, dtype: torch.dtype) -> Tensor:
    """See `Arithmetic.square_sums`."""
    parts = []
    for rows in chunks(grad):
        sums = grad[rows].to(dtype)
        sums = sums * sums
        for dim in range(grad.ndim - 1, max(keep, 0), -1):
            sums = sum_tiles(sums, tiles[dim], dim)
        parts.append(sums)
    sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    return sum_tiles(sums, tiles[0], 0) if keep < 0 and grad.ndim else sums


def fold(sums: Tensor, tiles: tuple[Tiles, ...], keep: int) -> Tensor:
    """See `Arithmetic.fold`."""
    for dim in range(keep, -1, -1):
        sums = sum_tiles(sums, tiles[dim], dim)
    return sums


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    scale: Tensor,
    tiles: tuple[Tiles, ...],
    *,
    decay: float,
    momentum: float,
    weight: float,
) -> None:
    """See `Arithmetic.update`."""
    dtype = scale.dtype
    for dim, tile in enumerate(tiles):
        if not (tile.is_whole or tile.is_unit):
            scale = scale.index_select(dim, _tile_numbers(tile, scale.device))
    for rows in chunks(param):
        value, average = param[rows], exp_avg[rows]
        result, new_average = value.to(dtype), average.to(dtype)  # the same memory where the dtype is the same
        new_average.mul_(momentum).add_(grad[rows].to(dtype) * weight)
        result.mul_(decay).sub_(new_average * (scale[rows] if scale.ndim and scale.shape[0] > 1 else scale))
        if value.dtype != dtype:
            value.copy_(result)
        if average.dtype != dtype:
            average.copy_(new_average)


def chunks(x: Tensor) -> Iterator[slice | tuple[()]]:
    """Slices of `x` along its first dim, about CHUNK elements each."""
    if x.ndim == 0:
        yield ()
        return
    rows = x.shape[0]
    step = max(1, (CHUNK if x.device.type == "cpu" else GPU_CHUNK) * rows // max(1, x.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def sum_tiles(x: Tensor, tiles: Tiles, dim: int) -> Tensor:
    """Sum `dim` over each of its tiles. Overwrites `x`."""
    if tiles.is_unit:
        return x
    if tiles.uniform is not None:
        return _halve(x.unflatten(dim, (tiles.count, tiles.uniform)), dim + 1).squeeze(dim + 1)
    result = x.new_empty(*x.shape[:dim], tiles.count, *x.shape[dim + 1 :])
    for length, (indices, numbers) in _by_length(tiles, x.device).items():
        part = _halve(x.index_select(dim, indices).unflatten(dim, (-1, length)), dim + 1)
        result.index_copy_(dim, numbers, part.squeeze(dim + 1))
    return result


def _halve(x: Tensor, dim: int) -> Tensor:
    """`reference.pairwise_sum` in place."""
    size = x.shape[dim]
    while size > 1:
        half = size // 2
        x.narrow(dim, 0, half).add_(x.narrow(dim, half, half))
        if size % 2:
            x.narrow(dim, 0, 1).add_(x.narrow(dim, size - 1, 1))
        size = half
    return x.narrow(dim, 0, 1)


@cache
def _tile_numbers(tiles: Tiles, device: torch.device) -> Tensor:
    """The tile number of every index of a dim, int64 [size]."""
    lengths = torch.tensor(tiles.lengths(), dtype=torch.int64)
    return torch.arange(tiles.count).repeat_interleave(lengths, output_size=tiles.size).to(device)


@cache
def _by_length(tiles: Tiles, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Per tile length: the indices of its tiles, int64 [count * length], and their numbers, int64 [count]."""
    lengths = torch.tensor(tiles.lengths(), dtype=torch.int64)
    of_index = lengths.repeat_interleave(lengths, output_size=tiles.size)
    return {
        length: (
            (of_index == length).nonzero().flatten().to(device),
            (lengths == length).nonzero().flatten().to(device),
        )
        for length in sorted(set(tiles.lengths()))
    }
