"""Statistics over seeds: means, paired differences, and whether a difference is significant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond ten, that of ten (slightly strict).
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Difference:
    """One variant's loss minus the first variant's, over the seeds that both have.

    Attributes:
        mean: of the differences seed by seed.
        standard_error: of the mean; None for a single seed.
        seeds: number of seeds.
    """

    mean: float
    standard_error: float | None
    seeds: int

    @property
    def t_statistic(self) -> float | None:
        """How many standard errors the mean is from zero; None for a single seed."""
        if self.standard_error is None:
            return None
        return abs(self.mean) / self.standard_error if self.standard_error else math.inf if self.mean else 0.0

    @property
    def critical_value(self) -> float:
        """The number of standard errors beyond which a difference is distinguishable from zero, at 95 %."""
        return _QUANTILES[min(self.seeds - 1, len(_QUANTILES)) - 1] if self.seeds > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval; for two or more seeds."""
        assert self.standard_error is not None
        margin = self.critical_value * self.standard_error
        return self.mean - margin, self.mean + margin

    @property
    def distinguishable(self) -> bool:
        return self.t_statistic is not None and self.t_statistic > self.critical_value

    def sentence(self, name: str, first: str) -> str:
        """The difference and its significance as a sentence."""
        above = "above" if self.mean > 0 else "below"
        result = f"{name} ends {abs(self.mean):.4f} {above} {first} in validation loss"
        if self.t_statistic is None:
            return f"{result}, with one seed: it may be chance. Run more seeds."
        size = (
            "by the same amount with every seed"
            if self.t_statistic == math.inf
            else f"{self.t_statistic:.1f} standard errors"
        )
        low, high = self.interval
        result = f"{result}, {size} over {self.seeds} seeds (95 %: {low:+.4f} to {high:+.4f})"
        if not self.distinguishable:
            return f"{result}: not distinguishable."
        return f"{result}: {first if self.mean > 0 else name} is better."


def difference(mine: Mapping[int, float], first: Mapping[int, float]) -> Difference | None:
    """The paired difference of two variants' losses; None if no seed has a finite loss for both.

    Args:
        mine, first: seed -> last validation loss.
    """
    pairs = [mine[seed] - first[seed] for seed in sorted(mine.keys() & first.keys())]
    pairs = [pair for pair in pairs if math.isfinite(pair)]
    if not pairs:
        return None
    standard_error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return Difference(statistics.fmean(pairs), standard_error, len(pairs))


def mean(values: Iterable[float]) -> float:
    """The mean; NaN without values."""
    numbers = list(values)
    return statistics.fmean(numbers) if numbers else math.nan


def median(values: Iterable[float]) -> float:
    """The median; NaN without values."""
    numbers = list(values)
    return statistics.median(numbers) if numbers else math.nan
