"""Which runs a comparison takes: learning rates first, with one seed, then the other seeds at each variant's best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

EXTENSIONS = 4
"""So many times at most a variant's list of learning rates is extended in search of its best."""


class Run(NamedTuple):
    """One training run."""

    variant: str
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        """Where it lies below the comparison's folder."""
        return f"runs/{self.variant}/lr-{self.lr}/seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, lr {self.lr:g}, seed {self.seed}"


Losses = Mapping[Run, float]
"""Finished run -> its last validation loss; infinite if it diverged."""


def wanted(variants: Mapping[str, float], lrs: Sequence[float], seeds: int, losses: Losses) -> list[Run]:
    """The runs that are still to be done, as far as can be known now; none if the comparison is complete.

    Args:
        variants: name -> the learning rate of its configuration.
        lrs: the learning rates of a sweep; empty for none.
        seeds: how many; they are 0, 1, ...
        losses: what is done.
    """
    runs = []
    for name, own in variants.items():
        if lrs:
            swept, best = sweep(name, lrs, losses)
            runs += [Run(name, lr, 0) for lr in swept]
            rest = [] if best is None else [Run(name, best, seed) for seed in range(1, seeds)]
        else:
            rest = [Run(name, own, seed) for seed in range(seeds)]
        runs += rest
    return sorted((run for run in runs if run not in losses), key=lambda run: run.seed)


def sweep(variant: str, lrs: Sequence[float], losses: Losses) -> tuple[list[float], float | None]:
    """The learning rates of a variant's sweep in rising order, extended as far as is known, and the best of them.

    The best is None while runs are missing. While it lies at an edge, that edge moves on by the factor between the last
    two values (2 if there is one value only), EXTENSIONS times at most. Of equal losses the smaller rate is the best,
    so that where all diverge, smaller ones are tried.
    """
    swept = sorted(set(lrs))
    for left in range(EXTENSIONS, -1, -1):
        found = [losses.get(Run(variant, lr, 0)) for lr in swept]
        if any(loss is None for loss in found):
            return swept, None
        best = min(zip(found, swept, strict=True))[1]
        further = _beyond(swept, best) if left else []
        if not further:
            break
        swept = sorted({*swept, *further})
    return swept, best


def at_edge(swept: Sequence[float], best: float) -> bool:
    """Whether a better learning rate may lie outside."""
    return best in (swept[0], swept[-1])


def _beyond(swept: Sequence[float], best: float) -> list[float]:
    """The next learning rates at the edges where the best lies."""
    beyond = []
    if best == swept[0]:
        beyond.append(swept[0] / (swept[1] / swept[0] if len(swept) > 1 else 2))
    if best == swept[-1]:
        beyond.append(swept[-1] * (swept[-1] / swept[-2] if len(swept) > 1 else 2))
    return [_short(lr) for lr in beyond]


def _short(lr: float) -> float:
    """Three digits that count, so that its folder has a name that can be read."""
    return float(f"{lr:.2e}") if math.isfinite(lr) else lr
