"""The losses of estimates of one parameter's second moments: one pass for the means, one for the errors, in windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from ..checkpoint.moments import spread
from ..layout import BlockLayout
from ..sharding import Box
from .estimates import Estimate
from .moments import Moments

WINDOW = 1 << 20
"""Elements processed at once: memory is a dozen float64 tensors of this size, and the block means."""

EXACT = 1e-14
"""Noise up to which an estimate counts as exact: the square of float32's relative rounding error."""


@dataclass(frozen=True)
class Loss:
    """The loss of one estimate, as sums, so that the losses of several parameters can be added.

    Attributes:
        elements: number of elements with v > 0.
        entries: number of second moments.
        errors: sum over these elements of (v / v^ - 1)^2.
        ratios, noisy: sum of the signal-to-noise ratios of the blocks that are not even, and their number.
        update: sum of squares of AdamW's last update, without learning rate and decay: m / (sqrt(v) + eps), with the
            bias correction of that step; 0 if the update is unknown.
        new_update: the same with v^ in place of v.
        difference: sum of squares of the difference of the two updates.
    """

    elements: int = 0
    entries: int = 0
    errors: float = 0.0
    ratios: float = 0.0
    noisy: int = 0
    update: float = 0.0
    new_update: float = 0.0
    difference: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Loss)))

    @property
    def known(self) -> bool:
        """Whether any element has had a gradient; if not, the estimate's loss is unknown."""
        return self.elements > 0

    @property
    def noise(self) -> float:
        """Mean over elements of (v / v^ - 1)^2."""
        return self.errors / self.elements if self.elements and self.errors > EXACT * self.elements else 0.0

    @property
    def snr(self) -> float:
        """1 / noise."""
        return 1 / self.noise if self.noise else inf

    @property
    def block_snr(self) -> float:
        """The plain mean of the blocks' ratios, as in SlimAdam."""
        return self.ratios / self.noisy if self.noisy else inf

    @property
    def rms_ratio(self) -> float | None:
        """RMS of the update with v^, relative to AdamW's; None if the update is unknown."""
        return sqrt(self.new_update / self.update) if self.update else None

    @property
    def distance(self) -> float | None:
        """RMS of the difference of the two updates, relative to AdamW's; None if the update is unknown."""
        return sqrt(self.difference / self.update) if self.update else None


def measure(moments: Moments, estimates: Mapping[str, Estimate], window: int = WINDOW) -> dict[str, Loss]:
    """The loss of each estimate on one parameter. Reads v twice and m once, `window` elements at a time.

    Raises ValueError, naming the parameter, if second moments are not finite.
    """
    lossy = {estimate.layouts: estimate for estimate in estimates.values() if not estimate.elementwise}
    means = _Means({layout for estimate in lossy.values() for layout in estimate.layouts})
    for box in moments.windows(window):
        means.add(moments.second(box).double(), box)
    means.finish(moments.name)
    tallies = {layouts: _Tally(one) for layouts, one in lossy.items()}
    elements, update_squares = 0, 0.0
    for box in moments.windows(window):
        second = moments.second(box).double()
        first = moments.first(box).double() if moments.first is not None and moments.step > 0 else None
        update = None if first is None else _update(moments, first, second)
        elements += int((second > 0).sum())
        update_squares += 0.0 if update is None else float(update.square().sum())
        for layouts, tally in tallies.items():
            hat = means.estimate(lossy[layouts], box)
            tally.add_errors(second, hat, box)
            if first is not None and update is not None:
                tally.add_updates(update, _update(moments, first, hat))
    return {
        name: tallies[estimate.layouts].loss(elements, update_squares)
        if estimate.layouts in tallies
        else Loss(elements, estimate.entries, update=update_squares, new_update=update_squares)
        for name, estimate in estimates.items()
    }


class _Tally:
    """The sums for one estimate of one parameter."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate, self.blocks = estimate, estimate.blocks
        self.errors, self.counts = torch.zeros(2, *self.blocks.grid_shape, dtype=torch.float64)
        self.new_update = self.difference = 0.0

    def add_errors(self, second: Tensor, hat: Tensor, box: Box) -> None:
        counted = second > 0
        _add(self.errors, torch.where(counted, second / hat - 1, 0.0).square_(), self.blocks, box)
        _add(self.counts, counted.double(), self.blocks, box)

    def add_updates(self, update: Tensor, new_update: Tensor) -> None:
        self.new_update += float(new_update.square().sum())
        self.difference += float(new_update.sub_(update).square_().sum())

    def loss(self, elements: int, update: float) -> Loss:
        noise = self.errors / self.counts
        ratios = noise[noise > EXACT].reciprocal()
        sums = float(self.errors.sum()), float(ratios.sum()), ratios.numel()
        return Loss(elements, self.estimate.entries, *sums, update, self.new_update, self.difference)


class _Means:
    """The means of one tensor over the blocks of several layouts, float64, accumulated box by box."""

    def __init__(self, layouts: set[BlockLayout]) -> None:
        self.grids = {layout: torch.zeros(layout.grid_shape, dtype=torch.float64) for layout in layouts}

    def add(self, values: Tensor, box: Box) -> None:
        for layout, grid in self.grids.items():
            _add(grid, values, layout, box)

    def finish(self, name: str) -> None:
        for layout, grid in self.grids.items():
            grid /= _sizes(layout)
            if not isfinite(float(grid.sum())):
                raise ValueError(f"{name} has second moments that are not finite: its run has diverged")

    def estimate(self, estimate: Estimate, box: Box) -> Tensor:
        """The estimate's second moments of a box."""
        return spread([self.grids[layout] for layout in estimate.layouts], estimate.layouts, box)


def _update(moments: Moments, first: Tensor, second: Tensor) -> Tensor:
    """AdamW's update in the step of the moments, from float64 moments, without learning rate and decay."""
    rate, square = (1 - beta**moments.step for beta in moments.betas)
    return (first / rate) / ((second / square).sqrt_().add_(moments.eps))


def _add(grid: Tensor, values: Tensor, layout: BlockLayout, box: Box) -> None:
    """Add the values of a box to their blocks."""
    spans = []
    for dim, (tiles, (start, stop)) in enumerate(zip(layout.dims, box, strict=True)):
        lo, hi = tiles.span(start, stop)
        spans.append(slice(lo, hi))
        if hi - lo == 1:
            values = values.sum(dim, keepdim=True)
        elif hi - lo < stop - start:
            lengths = torch.tensor(tiles.clip(start, stop).lengths())
            shape = [*values.shape[:dim], hi - lo, *values.shape[dim + 1 :]]
            index = torch.arange(hi - lo).repeat_interleave(lengths)
            values = values.new_zeros(shape).index_add_(dim, index, values)
    grid[tuple(spans)] += values


def _sizes(layout: BlockLayout) -> Tensor:
    """The number of elements of every block, float64."""
    sizes = torch.ones((), dtype=torch.float64)
    for tiles in layout.dims:
        sizes = sizes.unsqueeze(-1) * torch.tensor(tiles.lengths(), dtype=torch.float64)
    return sizes
