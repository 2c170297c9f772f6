"""What estimates of one parameter's second moments lose: a pass for the means and a pass for the errors, in windows."""

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
"""Elements that are looked at together: a dozen float64 tensors of this size are the memory that is needed, beside the
block means."""

EXACT = 1e-14
"""Noise up to which an estimate is exact: the square of what float32 rounds a number by."""


@dataclass(frozen=True)
class Loss:
    """What one estimate loses, as sums, so that those of several parameters add up.

    Attributes:
        elements: those with v > 0.
        entries: second moments that are kept.
        errors: sum over these elements of (v / v^ - 1)^2.
        ratios, noisy: sum of the signal-to-noise ratios of the blocks that are not even, and how many these are.
        own: sum of squares of the last update that AdamW took, without learning rate and decay: m / (sqrt(v) + eps),
            both moments corrected as in that step; 0 if nothing is known of updates.
        new: the same with v^ in place of v.
        apart: sum of squares of the difference of the two.
    """

    elements: int = 0
    entries: int = 0
    errors: float = 0.0
    ratios: float = 0.0
    noisy: int = 0
    own: float = 0.0
    new: float = 0.0
    apart: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Loss)))

    @property
    def known(self) -> bool:
        """Has any element had a gradient? If not, nothing is known of the estimate."""
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
        """The plain mean of the blocks' ratios, as SlimAdam has it."""
        return self.ratios / self.noisy if self.noisy else inf

    @property
    def rms_ratio(self) -> float | None:
        """RMS of the update with v^ over that of AdamW's; None where nothing is known of updates."""
        return sqrt(self.new / self.own) if self.own else None

    @property
    def distance(self) -> float | None:
        """RMS of the difference of the two updates over that of AdamW's."""
        return sqrt(self.apart / self.own) if self.own else None


def measure(moments: Moments, estimates: Mapping[str, Estimate], window: int = WINDOW) -> dict[str, Loss]:
    """What each estimate loses on one parameter. Reads v twice and m once, `window` elements at a time.

    Raises ValueError, naming the parameter, if second moments are not finite.
    """
    lossy = {one.layouts: one for one in estimates.values() if not one.elementwise}
    means = _Means({layout for one in lossy.values() for layout in one.layouts})
    for box in moments.windows(window):
        means.add(moments.second(box).double(), box)
    means.finish(moments.name)
    tallies = {layouts: _Tally(one) for layouts, one in lossy.items()}
    elements, own = 0, 0.0
    for box in moments.windows(window):
        second = moments.second(box).double()
        first = moments.first(box).double() if moments.first is not None and moments.step > 0 else None
        update = None if first is None else _update(moments, first, second)
        elements += int((second > 0).sum())
        own += 0.0 if update is None else float(update.square().sum())
        for layouts, tally in tallies.items():
            hat = means.estimate(lossy[layouts], box)
            tally.add_errors(second, hat, box)
            if first is not None and update is not None:
                tally.add_updates(update, _update(moments, first, hat))
    return {
        name: tallies[one.layouts].loss(elements, own)
        if one.layouts in tallies
        else Loss(elements, one.entries, own=own, new=own)
        for name, one in estimates.items()
    }


class _Tally:
    """The sums for one estimate of one parameter."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate, self.blocks = estimate, estimate.blocks
        self.errors, self.alive = torch.zeros(2, *self.blocks.grid_shape, dtype=torch.float64)
        self.new = self.apart = 0.0

    def add_errors(self, second: Tensor, hat: Tensor, box: Box) -> None:
        counted = second > 0
        _add(self.errors, torch.where(counted, second / hat - 1, 0.0).square_(), self.blocks, box)
        _add(self.alive, counted.double(), self.blocks, box)

    def add_updates(self, update: Tensor, changed: Tensor) -> None:
        self.new += float(changed.square().sum())
        self.apart += float(changed.sub_(update).square_().sum())

    def loss(self, elements: int, own: float) -> Loss:
        noise = self.errors / self.alive
        ratios = noise[noise > EXACT].reciprocal()
        sums = float(self.errors.sum()), float(ratios.sum()), ratios.numel()
        return Loss(elements, self.estimate.entries, *sums, own, self.new, self.apart)


class _Means:
    """The means of one tensor over the blocks of several layouts, float64, gathered box by box."""

    def __init__(self, layouts: set[BlockLayout]) -> None:
        self.grids = {layout: torch.zeros(layout.grid_shape, dtype=torch.float64) for layout in layouts}

    def add(self, values: Tensor, box: Box) -> None:
        for layout, grid in self.grids.items():
            _add(grid, values, layout, box)

    def finish(self, name: str) -> None:
        for layout, grid in self.grids.items():
            grid /= _sizes(layout)
            if not isfinite(float(grid.sum())):
                raise ValueError(f"{name} has second moments that are not finite: that run has diverged")

    def estimate(self, estimate: Estimate, box: Box) -> Tensor:
        """The estimate's second moments of a box."""
        return spread([self.grids[layout] for layout in estimate.layouts], estimate.layouts, box)


def _update(moments: Moments, first: Tensor, second: Tensor) -> Tensor:
    """The update that AdamW took in the moments' step, from float64 moments, without learning rate and decay."""
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
