"""The reference: a step's arithmetic, block by block in plain torch. Slow; all other engines are tested against it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ..layout import Tiles


def pairwise_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, kept at size 1, by adding the second half to the first until one entry is left.

    This is the order of summation. It is a function of the length of `dim` alone, each addition is one IEEE
    operation, and the error grows with log2 of the length.
    """
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        first, second, rest = x.split([half, half, x.shape[dim] - 2 * half], dim)
        x = first + second
        x.narrow(dim, 0, rest.shape[dim]).add_(rest)
    return x


def square_sums(grad: Tensor, tiles: tuple[Tiles, ...], keep: int, dtype: torch.dtype) -> Tensor:
    """See `Arithmetic.square_sums`."""
    sums = grad.to(dtype)
    sums = sums * sums
    for dim in range(grad.ndim - 1, keep, -1):
        sums = torch.cat([pairwise_sum(tile, dim) for tile in sums.split(tiles[dim].lengths(), dim)], dim)
    return sums


def fold(sums: Tensor, tiles: tuple[Tiles, ...], keep: int) -> Tensor:
    """See `Arithmetic.fold`."""
    for dim in range(keep, -1, -1):
        sums = torch.cat([pairwise_sum(tile, dim) for tile in sums.split(tiles[dim].lengths(), dim)], dim)
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
    edges = [[(start, start + n) for start, n in zip(t.starts(), t.lengths(), strict=True)] for t in tiles]
    for block in product(*(range(t.count) for t in tiles)):
        here = tuple(slice(*edges[dim][tile]) for dim, tile in enumerate(block))
        average = exp_avg[here].to(dtype) * momentum + grad[here].to(dtype) * weight
        exp_avg[here] = average.to(exp_avg.dtype)
        param[here] = (param[here].to(dtype) * decay - average * scale[block]).to(param.dtype)
