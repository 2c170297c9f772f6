"""Which runs a comparison needs: learning rates first, with one seed, then the other seeds at each variant's best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EXTENSIONS = 4
"""The list of learning rates of a variant is extended at most this many times in search of its best."""


class Run(NamedTuple):
    """One training run."""

    variant: str
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        """Its folder, relative to the comparison's."""
        return f"runs/{self.variant}/lr-{self.lr}/seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, lr {self.lr:g}, seed {self.seed}"


Losses = Mapping[Run, float]
"""Finished run -> its last validation loss; infinite if it diverged."""


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Attributes:
        variants: name -> the learning rate of its configuration.
        lrs: the learning rates of a sweep, for every variant; empty for none.
        seeds: number of seeds; they are 0, 1, ...
    """

    variants: Mapping[str, float]
    lrs: Sequence[float]
    seeds: int

    def remaining(self, losses: Losses) -> list[Run]:
        """The runs that can be determined now and are not finished, in the order to run them in."""
        runs = []
        for name in self.variants:
            swept, best = self.sweep(name, losses)
            runs += [Run(name, lr, 0) for lr in swept]
            runs += [] if best is None else [Run(name, best, seed) for seed in range(1, self.seeds)]
        return sorted((run for run in runs if run not in losses), key=lambda run: run.seed)

    def expected(self, losses: Losses) -> int:
        """The total number of runs, as far as can be determined now."""
        return sum(len(self.sweep(name, losses)[0]) + self.seeds - 1 for name in self.variants)

    def sweep(self, variant: str, losses: Losses) -> tuple[list[float], float | None]:
        """The learning rates of a variant in ascending order, with the extensions known so far, and the best of them.

        Without a sweep there is only the configured one. In a sweep, the best is None while runs are missing. While it
        is at an edge, that edge is extended by the factor between the last two values (2 if there is only one value),
        at most EXTENSIONS times. Of equal losses, that of the smaller rate is the best, so that only smaller rates are
        tried if all diverge.
        """
        if not self.lrs:
            return [self.variants[variant]], self.variants[variant]
        swept = sorted(set(self.lrs))
        for left in range(EXTENSIONS, -1, -1):
            found = {lr: losses[Run(variant, lr, 0)] for lr in swept if Run(variant, lr, 0) in losses}
            if len(found) < len(swept):
                return swept, None
            best = min(swept, key=lambda lr: found[lr])
            further = _beyond(swept, best, up=math.isfinite(found[best])) if left else []
            if not further:
                break
            swept = sorted({*swept, *further})
        return swept, best


def at_edge(swept: Sequence[float], best: float) -> bool:
    """Whether a better learning rate may lie beyond those tried."""
    return best in (swept[0], swept[-1])


def _beyond(swept: Sequence[float], best: float, up: bool) -> list[float]:
    """The next learning rates at the edges where the best lies, with three digits: they are in the names of folders."""
    beyond = []
    if best == swept[0]:
        beyond.append(swept[0] / (swept[1] / swept[0] if len(swept) > 1 else 2))
    if best == swept[-1] and up:
        beyond.append(swept[-1] * (swept[-1] / swept[-2] if len(swept) > 1 else 2))
    return [float(f"{lr:.2e}") for lr in beyond]
