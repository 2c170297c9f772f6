"""A step in torch operations, one parameter after the other: the order of Algorithm 1, around an engine's three sums.

`reference` and `vectorized` bring `square_sums`, `fold` and `update`; this file what is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ..layout import Tiles
from ..plan import BlockPlan
from . import ParamStep, Spec, columns, int8, rounding, vectorized
from .check import look_at


class Arithmetic(Protocol):
    """What `reference` and `vectorized` have in common. Tensors come with their tiles, one `Tiles` per dim."""

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


class Tensorwise:
    """An engine (see `kernels.Engine`) from three sums."""

    step_on_device = False

    def __init__(self, name: str, arithmetic: Arithmetic) -> None:
        self.name = name
        self.version = f"{name}, torch {torch.__version__}"
        self.arithmetic = arithmetic

    def fallback(self, spec: Spec) -> str | None:
        """See `Engine.fallback`: there is none."""
        return None

    def check(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.check`."""
        for work in works:
            look_at(work, None)

    def square_sums(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.square_sums`."""
        for work in works:
            assert work.grad is not None
            if work.by_columns:
                columns.take_squares(work, self.arithmetic.square_sums)
                columns.share([work])
            elif work.own_sums is not None:
                self.add_sums(work.plan, work.grad, work.own_sums)

    def add_sums(self, plan: BlockPlan, grad: Tensor, sums: Tensor) -> None:
        """Add the sums of squares of this rank's part to `sums`, [plan.sums_shape]."""
        for view, (tiles, place, _) in zip(plan.shard.views(grad), plan.parts, strict=True):
            if view.numel():
                sums[place] += self.arithmetic.square_sums(view, tiles, plan.keep, sums.dtype)

    def means(self, plan: BlockPlan, sums: Tensor) -> Tensor:
        """Sums as the exchange has them, [plan.sums_shape], as means over every block, [plan.grid_shape]."""
        if sums.numel() == 0:
            return sums.new_zeros(plan.grid_shape)
        sums = self.arithmetic.fold(sums, plan.reach_tiles, plan.keep)
        for dim, tiles in enumerate(plan.reach_tiles):
            if tiles.uniform is None:
                sums = sums / _lengths(tiles, sums.dtype, sums.device).view(-1, *[1] * (sums.ndim - dim - 1))
        return sums / math.prod(tiles.uniform or 1 for tiles in plan.reach_tiles)

    def block_means(self, work: ParamStep) -> list[Tensor]:
        """Mean square of the gradient over every block of this rank's reach, for each of its grids; a missing gradient
        counts as zeros."""
        dtype = work.exp_avg_sq.dtype
        if work.by_columns:
            if work.squares is None and work.grad is not None:
                columns.take_squares(work, self.arithmetic.square_sums)
            # The columns' sums are float64 up to their mean.
            complete = [(grid.plan, columns.gathered(work, kind, grid)) for kind, grid in columns.grids(work)]
            return [self.means(plan, sums).to(dtype) for plan, sums in complete]
        sums = work.sums
        if sums is None:
            sums = torch.zeros(work.plan.sums_shape, dtype=dtype, device=work.param.device)
            if work.grad is not None:
                self.add_sums(work.plan, work.grad, sums)
        return [self.means(work.plan, sums.to(dtype))]

    def advance(self, work: ParamStep) -> None:
        """Move all second moments of a work on by one step; its `step` is not moved."""
        beta2 = work.group["betas"][1]
        moments = [work.exp_avg_sq, *(factor.exp_avg_sq for factor in work.factors)]
        for grid, mean in zip(moments, self.block_means(work), strict=True):
            grid.mul_(beta2).add_(mean * (1 - beta2))

    def update(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.update`."""
        for work in works:
            if work.grad is not None or (work.present is not None and work.present.item() > 0):
                self._update(work)

    def _update(self, work: ParamStep) -> None:
        plan, grad, group = work.plan, work.grad, work.group
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        self.advance(work)
        work.step += 1
        step = float(work.step)
        if grad is None or grad.numel() == 0:
            return

        def scale(root: Tensor) -> Tensor:
            """What the momentum is multiplied with."""
            return (lr / (1 - beta1**step)) / root.add_(group["eps"])

        decay = 1 - lr * group["weight_decay"] if work.decay else 1.0
        weight = (beta1 - 1) if group["maximize"] else (1 - beta1)

        param, exp_avg = work.param, work.exp_avg
        if work.exp_avg_scale is not None:
            exp_avg = int8.dequantized(exp_avg, work.exp_avg_scale)
        if rounds := work.seed is not None and param.dtype == torch.bfloat16:
            param = param.to(work.exp_avg_sq.dtype)
        views = plan.shard.views
        numbers = {"decay": decay, "momentum": beta1, "weight": weight}
        if work.by_columns:
            boxes = columns.roots(work, 1 - beta2**step)
            for p, g, m, (of_rows, of_columns) in zip(views(param), views(grad), views(exp_avg), boxes, strict=True):
                for rows in vectorized.chunks(p):
                    a, b = (root[rows if root.shape[0] > 1 else ...] for root in (of_rows, of_columns))
                    vectorized.update(p[rows], g[rows], m[rows], scale(a * b), (), **numbers)
        else:
            scales = scale((work.exp_avg_sq / (1 - beta2**step)).sqrt_())
            for p, g, m, (tiles, _, blocks) in zip(views(param), views(grad), views(exp_avg), plan.parts, strict=True):
                self.arithmetic.update(p, g, m, scales[blocks], tiles, **numbers)
        if work.exp_avg_scale is not None:
            int8.quantize(exp_avg, work.exp_avg, work.exp_avg_scale)
        if rounds:
            assert work.seed is not None
            key = rounding.key(work.seed, int(step))
            for old, new, box in zip(views(work.param), views(param), plan.own, strict=True):
                old.copy_(rounding.stochastic(new, rounding.indices(plan.layout.shape, box, new.device), key))


@cache
def _lengths(tiles: Tiles, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The length of every tile of a dim, as a tensor."""
    return torch.tensor(tiles.lengths(), dtype=dtype, device=device)
