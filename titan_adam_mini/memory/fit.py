"""Searches for the largest batch, the longest sequence and the fewest GPUs within a budget, with few simulations.

Peaks grow with batch and sequence and fall with the number of GPUs, nearly linearly (in 1/N for GPUs). A search
interpolates between the peaks simulated so far, and ends when an answer and its neighbour have both been simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BATCH, SEQUENCE, GPUS = "local batch", "sequence", "GPUs"
LIMITS = {BATCH: 1 << 10, SEQUENCE: 1 << 20, GPUS: 1 << 13}
"""The value at which a search gives up."""


@dataclass(frozen=True)
class Found:
    """The result of one search.

    Attributes:
        value: the largest value (smallest for GPUs) that fits; None if none does.
        peak: bytes at that value.
        beyond: bytes at the next value, which does not fit; None if the search gave up there.
    """

    value: int | None
    peak: int | None = None
    beyond: int | None = None


def largest(peak: Callable[[int], int], budget: int, unit: int, start: int, limit: int) -> Found:
    """The largest multiple of `unit`, up to `limit`, whose peak is at most `budget` bytes.

    Args:
        peak: value -> bytes, increasing.
        start: the first value to try, a multiple of `unit`.
    """
    low, high, seen = _bracket(lambda number: peak(number * unit), budget, 1, max(1, start // unit), limit // unit)
    return Found(low * unit if low else None, seen.get(low), seen.get(high))


def fewest(peak: Callable[[int], int], budget: int, unit: int, start: int, limit: int) -> Found:
    """The smallest multiple of `unit`, up to `limit`, whose peak is at most `budget` bytes; `peak` is decreasing."""
    low, high, seen = _bracket(lambda number: peak(number * unit), budget, -1, max(1, start // unit), limit // unit)
    return Found(high * unit if high * unit <= limit else None, seen.get(high), seen.get(low))


def _bracket(
    peak: Callable[[int], int], budget: int, power: int, guess: int, limit: int
) -> tuple[int, int, dict[int, int]]:
    """Neighbours, from 0 to `limit` + 1, between which the peak crosses `budget`; and all peaks computed.

    Args:
        power: 1 if the peak is about a + b n, -1 if it is about a + b / n.
    """
    seen: dict[int, int] = {}
    low, high = 0, limit + 1
    while high - low > 1:
        width = high - low
        seen[guess] = peak(guess)
        low, high = (guess, high) if (seen[guess] <= budget) == (power > 0) else (low, guess)
        ends = [end for end in (low, high) if end in seen]
        pair = ends if len(ends) == 2 else sorted(seen, key=lambda number: abs(seen[number] - budget))[:2]
        crossing = _crossing({number**power: seen[number] for number in pair}, budget)
        if high > limit and len(seen) > 1 and not crossing:
            guess = limit  # the peak does not depend on the value, so try the limit directly
        elif crossing and (len(seen) < 4 or 2 * (high - low) < width):
            guess = int(crossing**power)
        else:
            guess = (low + high) // 2 if high <= limit else 2 * guess
        guess = min(max(guess, low + 1), high - 1)
    return low, high, seen


def _crossing(seen: dict[float, int], budget: int) -> float | None:
    """Where the line through two points reaches `budget`; None with one point, a flat line, or if it never does."""
    if len(seen) < 2:
        return None
    (x1, y1), (x2, y2) = seen.items()
    if y1 == y2:
        return None
    crossing = x1 + (budget - y1) * (x2 - x1) / (y2 - y1)
    return crossing if crossing > 0 else None
