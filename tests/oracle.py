"""The oracle: Adam-mini on one device in float64, block by block, straight from the paper (Algorithms 1 and 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from titan_adam_mini.layout import BlockLayout


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
    """Full float64 tensors, their first moments, one second moment per block, and a step count each."""

    def __init__(self, params: Mapping[str, Tensor], layouts: Mapping[str, BlockLayout]) -> None:
        self.layouts = dict(layouts)
        self.params = {name: value.detach().double().clone() for name, value in params.items()}
        self.exp_avg = {name: torch.zeros_like(value) for name, value in self.params.items()}
        self.exp_avg_sq = {
            name: torch.zeros(self.layouts[name].grid_shape, dtype=torch.float64) for name in self.params
        }
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
        """One update; a parameter without a gradient, or not in `grads`, is left alone."""
        beta1, beta2 = betas
        for name, p in self.params.items():
            grad = grads.get(name)
            if grad is None:
                continue
            g, m, v = grad.double(), self.exp_avg[name], self.exp_avg_sq[name].view(-1)
            self.steps[name] += 1
            t = self.steps[name]
            here = list(blocks(self.layouts[name]))
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * torch.stack([(g[block] ** 2).mean() for block in here]))
            denominator = torch.empty_like(p)
            for block, root in zip(here, (v / (1 - beta2**t)).sqrt(), strict=True):
                denominator[block] = root + eps
            p.copy_(p * (1 - lr * weight_decay[name]) - lr * (m / (1 - beta1**t)) / denominator)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
