"""Engines in torch operations, one parameter at a time, in the order of Algorithm 1.

`reference` and `vectorized` implement `square_sums`, `fold` and `update`; this file has the shared code.
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
from .check import check_tensors


class Arithmetic(Protocol):
    """The interface of `reference` and `vectorized`. Tensors come with their tiles, one `Tiles` per dim."""

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

        `scale` has one entry per block; its dtype, float32 or float64, is that of the arithmetic.
        """


class Tensorwise:
    """An engine (see `kernels.Engine`) built from an `Arithmetic`."""

    step_on_device = False

    def __init__(self, name: str, arithmetic: Arithmetic) -> None:
        self.name = name
        self.version = f"{name}, torch {torch.__version__}"
        self.arithmetic = arithmetic

    def fallback(self, spec: Spec) -> str | None:
        """See `Engine.fallback`: there is none."""
        return None

    def check(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.check`."""
        for param_step in param_steps:
            check_tensors(param_step, None)

    def square_sums(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.square_sums`."""
        for param_step in param_steps:
            assert param_step.grad is not None
            if param_step.by_columns:
                columns.compute_squares(param_step, self.arithmetic.square_sums)
                columns.add_to_exchange([param_step])
            elif param_step.own_sums is not None:
                self.add_sums(param_step.plan, param_step.grad, param_step.own_sums)

    def add_sums(self, plan: BlockPlan, grad: Tensor, sums: Tensor) -> None:
        """Add the sums of squares of this rank's part to `sums`, [plan.sums_shape]."""
        for view, (tiles, place, _) in zip(plan.shard.views(grad), plan.parts, strict=True):
            if view.numel():
                sums[place] += self.arithmetic.square_sums(view, tiles, plan.keep, sums.dtype)

    def means(self, plan: BlockPlan, sums: Tensor) -> Tensor:
        """Means over every block, [plan.grid_shape], from sums as they are exchanged, [plan.sums_shape]."""
        if sums.numel() == 0:
            return sums.new_zeros(plan.grid_shape)
        sums = self.arithmetic.fold(sums, plan.reach_tiles, plan.keep)
        for dim, tiles in enumerate(plan.reach_tiles):
            if tiles.uniform is None:
                sums = sums / _lengths(tiles, sums.dtype, sums.device).view(-1, *[1] * (sums.ndim - dim - 1))
        return sums / math.prod(tiles.uniform or 1 for tiles in plan.reach_tiles)

    def block_means(self, param_step: ParamStep) -> list[Tensor]:
        """Mean square of the gradient over every block of this rank's reach, for each of its grids; a missing gradient
        counts as zeros."""
        dtype = param_step.exp_avg_sq.dtype
        if param_step.by_columns:
            if param_step.squares is None and param_step.grad is not None:
                columns.compute_squares(param_step, self.arithmetic.square_sums)
            # The columns' sums are float64 up to their mean.
            complete = [
                (grid.plan, columns.complete_sums(param_step, kind, grid)) for kind, grid in columns.grids(param_step)
            ]
            return [self.means(plan, sums).to(dtype) for plan, sums in complete]
        sums = param_step.sums
        if sums is None:
            sums = torch.zeros(param_step.plan.sums_shape, dtype=dtype, device=param_step.param.device)
            if param_step.grad is not None:
                self.add_sums(param_step.plan, param_step.grad, sums)
        return [self.means(param_step.plan, sums.to(dtype))]

    def advance(self, param_step: ParamStep) -> None:
        """Advance all second moments of a parameter by one step, but not its `step`."""
        beta2 = param_step.group["betas"][1]
        moments = [param_step.exp_avg_sq, *(factor.exp_avg_sq for factor in param_step.factors)]
        for grid, mean in zip(moments, self.block_means(param_step), strict=True):
            grid.mul_(beta2).add_(mean * (1 - beta2))

    def update(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.update`."""
        for param_step in param_steps:
            if param_step.grad is not None or (param_step.present is not None and param_step.present.item() > 0):
                self._update(param_step)

    def _update(self, param_step: ParamStep) -> None:
        plan, grad, group = param_step.plan, param_step.grad, param_step.group
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        self.advance(param_step)
        param_step.step += 1
        step = float(param_step.step)
        if grad is None or grad.numel() == 0:
            return

        def scale(root: Tensor) -> Tensor:
            """The factor for the momentum."""
            return (lr / (1 - beta1**step)) / root.add_(group["eps"])

        decay = 1 - lr * group["weight_decay"] if param_step.decay else 1.0
        weight = (beta1 - 1) if group["maximize"] else (1 - beta1)

        param, exp_avg = param_step.param, param_step.exp_avg
        if param_step.exp_avg_scale is not None:
            exp_avg = int8.dequantized(exp_avg, param_step.exp_avg_scale)
        if rounds := param_step.seed is not None and param.dtype == torch.bfloat16:
            param = param.to(param_step.exp_avg_sq.dtype)
        views = plan.shard.views
        numbers = {"decay": decay, "momentum": beta1, "weight": weight}
        if param_step.by_columns:
            boxes = columns.roots(param_step, 1 - beta2**step)
            for p, g, m, (of_rows, of_columns) in zip(views(param), views(grad), views(exp_avg), boxes, strict=True):
                for rows in vectorized.chunks(p):
                    a, b = (root[rows if root.shape[0] > 1 else ...] for root in (of_rows, of_columns))
                    vectorized.update(p[rows], g[rows], m[rows], scale(a * b), (), **numbers)
        else:
            scales = scale((param_step.exp_avg_sq / (1 - beta2**step)).sqrt_())
            for p, g, m, (tiles, _, blocks) in zip(views(param), views(grad), views(exp_avg), plan.parts, strict=True):
                self.arithmetic.update(p, g, m, scales[blocks], tiles, **numbers)
        if param_step.exp_avg_scale is not None:
            int8.quantize(exp_avg, param_step.exp_avg, param_step.exp_avg_scale)
        if rounds:
            assert param_step.seed is not None
            key = rounding.key(param_step.seed, int(step))
            for old, new, box in zip(views(param_step.param), views(param), plan.own, strict=True):
                old.copy_(rounding.stochastic(new, rounding.indices(plan.layout.shape, box, new.device), key))


@cache
def _lengths(tiles: Tiles, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The length of every tile of a dim, as a tensor."""
    return torch.tensor(tiles.lengths(), dtype=dtype, device=device)
