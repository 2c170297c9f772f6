"""What the numbers of several seeds say: means, paired differences, and whether they can be told from chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond ten, that of ten, a little strict.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Difference:
    """What one variant's loss is above the first's, over the seeds that both have.

    Attributes:
        mean: of the differences seed by seed.
        error: its standard error; None for a single seed.
        seeds: how many.
    """

    mean: float
    error: float | None
    seeds: int

    @property
    def errors(self) -> float | None:
        """How many standard errors the mean is from zero; None for a single seed."""
        if self.error is None:
            return None
        return abs(self.mean) / self.error if self.error else math.inf if self.mean else 0.0

    @property
    def needed(self) -> float:
        """So many standard errors would be distinguishable from zero, at 95 %."""
        return _QUANTILES[min(self.seeds - 1, len(_QUANTILES)) - 1] if self.seeds > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """Where the difference lies, at 95 %; for two seeds and more."""
        assert self.error is not None
        return self.mean - self.needed * self.error, self.mean + self.needed * self.error

    @property
    def distinguishable(self) -> bool:
        return self.errors is not None and self.errors > self.needed

    def sentence(self, name: str, first: str) -> str:
        """In words, as far as the numbers go."""
        above = "above" if self.mean > 0 else "below"
        told = f"{name} ends {abs(self.mean):.4f} {above} {first} in validation loss"
        if self.errors is None:
            return f"{told}, with one seed: nothing is known of chance. Run more seeds."
        shown = (
            "by the same amount with every seed" if self.errors == math.inf else f"{self.errors:.1f} standard errors"
        )
        low, high = self.interval
        told = f"{told}, {shown} over {self.seeds} seeds (95 %: {low:+.4f} to {high:+.4f})"
        if not self.distinguishable:
            return f"{told}: not distinguishable."
        return f"{told}: {first if self.mean > 0 else name} is better."


def difference(mine: Mapping[int, float], first: Mapping[int, float]) -> Difference | None:
    """The paired difference of two variants' losses; None if no seed has a finite loss for both.

    Args:
        mine, first: seed -> last validation loss.
    """
    pairs = [mine[seed] - first[seed] for seed in sorted(mine.keys() & first.keys())]
    pairs = [one for one in pairs if math.isfinite(one)]
    if not pairs:
        return None
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return Difference(statistics.fmean(pairs), error, len(pairs))


def mean(values: Iterable[float]) -> float:
    """Not a number where there are none."""
    there = list(values)
    return statistics.fmean(there) if there else math.nan


def median(values: Iterable[float]) -> float:
    """Not a number where there are none."""
    there = list(values)
    return statistics.median(there) if there else math.nan
