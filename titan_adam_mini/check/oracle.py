"""The oracle: Adam-mini on one device in float64, block by block, as in the paper (Algorithms 1 and 3).

Also with factored second moments (arXiv 1804.04235, Algorithm 2): row mean times column mean over the matrix mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from ..layout import BlockLayout


def blocks(layout: BlockLayout) -> Iterator[tuple[slice, ...]]:
    """Every block of a layout as slices, in row-major order of the grid."""
    edges = []
    for tiles in layout.dims:
        start, dim = 0, []
        for length in tiles.lengths():
            dim.append(slice(start, start + length))
            start += length
        edges.append(dim)
    yield from product(*edges)


class Oracle:
    """Full float64 tensors, their first moments, one second moment per block, and a step count each.

    Parameters in `factors` have two more grids, of their columns and of the full matrix.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        layouts: Mapping[str, BlockLayout],
        factors: Mapping[str, tuple[BlockLayout, BlockLayout]] | None = None,
    ) -> None:
        self.layouts = dict(layouts)
        self.factors = dict(factors or {})
        self.params = {name: value.detach().double().clone() for name, value in params.items()}
        self.exp_avg = {name: torch.zeros_like(value) for name, value in self.params.items()}
        self.exp_avg_sq = {
            name: torch.zeros(self.layouts[name].grid_shape, dtype=torch.float64) for name in self.params
        }
        self.exp_avg_sq_col, self.exp_avg_sq_mean = (
            {name: torch.zeros(two[place].grid_shape, dtype=torch.float64) for name, two in self.factors.items()}
            for place in range(2)
        )
        self.steps = dict.fromkeys(self.params, 0)

    def step(
        self,
        grads: Mapping[str, Tensor | None],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Mapping[str, float],
    ) -> None:
        """One update; a parameter without a gradient, or not in `grads`, does not change."""
        beta1, beta2 = betas
        for name, p in self.params.items():
            grad = grads.get(name)
            if grad is None:
                continue
            g, m = grad.double(), self.exp_avg[name]
            self.steps[name] += 1
            t = self.steps[name]
            m.copy_(beta1 * m + (1 - beta1) * g)
            second = _advanced(self.exp_avg_sq[name], self.layouts[name], g, beta2)
            if name in self.factors:
                grids = (self.exp_avg_sq_col[name], self.exp_avg_sq_mean[name])
                columns, whole = (
                    _advanced(grid, layout, g, beta2) for grid, layout in zip(grids, self.factors[name], strict=True)
                )
                second = torch.where(whole > 0, second * columns / whole, 0.0)
            denominator = (second / (1 - beta2**t)).sqrt() + eps
            p.copy_(p * (1 - lr * weight_decay[name]) - lr * (m / (1 - beta1**t)) / denominator)


def _advanced(grid: Tensor, layout: BlockLayout, grad: Tensor, beta2: float) -> Tensor:
    """Advance a grid by one step; returns the second moment of every element."""
    v, here, elements = grid.view(-1), list(blocks(layout)), torch.empty_like(grad)
    v.copy_(beta2 * v + (1 - beta2) * torch.stack([(grad[block] ** 2).mean() for block in here]))
    for block, value in zip(here, v, strict=True):
        elements[block] = value
    return elements


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
