"""The arithmetic of a step on local tensors: one file per engine behind one signature.

An engine is a module with three functions (`Engine` below). All of them take a tensor together with its tiles,
one `Tiles` per dim. Every engine owns its order of summation: it depends on the block alone, never on how many
blocks or rows a rank holds, so that any sharding adds in the order of a single device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..layout import Tiles
from . import reference, vectorized


class Engine(Protocol):
    """What `reference` and `vectorized` have in common."""

    __name__: str

    def square_sums(self, grad: Tensor, tiles: tuple[Tiles, ...], keep: int, dtype: torch.dtype) -> Tensor:
        """Sums of squares in `dtype`: dims up to `keep` index by index, deeper dims summed over each tile.

        A dim that is summed has one entry per tile in the result.
        """

    def fold(self, sums: Tensor, tiles: tuple[Tiles, ...], keep: int) -> Tensor:
        """Finish `square_sums(..., keep)`: sum dims 0..keep over their tiles. May overwrite `sums`."""

    def update(
        self,
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
        """In place: exp_avg = momentum * exp_avg + weight * grad; param = decay * param - scale * exp_avg.

        `scale` has one entry per block and float32 or float64 dtype, in which all is computed.
        """


def choose(foreach: bool | None, fused: bool | None) -> tuple[Engine, str]:
    """The engine that torch's `foreach` and `fused` flags ask for, and a line that says which one and why.

    Raises ValueError if both are asked for.
    """
    if foreach and fused:
        raise ValueError("foreach=True and fused=True cannot be combined; pass one of them, or neither")
    if foreach is False and not fused:
        return reference, "for-loop (block by block: the slow reference)"
    fallback = "; fused was asked for, and there is no fused kernel in this version" if fused else ""
    return vectorized, f"foreach (vectorized torch){fallback}"


def by_name(name: str) -> Engine:
    """The engine whose module is called `name`; how a pickled optimizer finds its engine again."""
    return {engine.__name__: engine for engine in (reference, vectorized)}[name]
