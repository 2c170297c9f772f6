"""What fits: the largest batch, the longest sequence, the fewest GPUs under a budget, found with few simulations.

Peaks grow with batch and sequence and fall with the number of GPUs, nearly along straight lines (in 1/N for GPUs). A
search draws a line through what it has seen, and ends when an answer and its neighbour have both been simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BATCH, SEQUENCE, GPUS = "local batch", "sequence", "GPUs"
LIMITS = {BATCH: 1 << 10, SEQUENCE: 1 << 20, GPUS: 1 << 13}
"""Where a search gives up."""


@dataclass(frozen=True)
class Found:
    """The answer to one question.

    Attributes:
        value: the largest (smallest for GPUs) that fits, in the question's own unit; None if nothing does.
        peak: bytes at that value.
        beyond: bytes at the next value, which does not fit; None if the search was given up there.
    """

    value: int | None
    peak: int | None = None
    beyond: int | None = None


def largest(peak: Callable[[int], int], room: int, unit: int, start: int, limit: int) -> Found:
    """The largest multiple of `unit`, up to `limit`, whose peak is within `room` bytes.

    Args:
        peak: value -> bytes, growing.
        start: where to look first, a multiple of `unit`.
    """
    low, high, seen = _bracket(lambda number: peak(number * unit), room, 1, max(1, start // unit), limit // unit)
    return Found(low * unit if low else None, seen.get(low), seen.get(high))


def fewest(peak: Callable[[int], int], room: int, unit: int, start: int, limit: int) -> Found:
    """The smallest multiple of `unit`, up to `limit`, whose peak is within `room` bytes; `peak` falls."""
    low, high, seen = _bracket(lambda number: peak(number * unit), room, -1, max(1, start // unit), limit // unit)
    return Found(high * unit if high * unit <= limit else None, seen.get(high), seen.get(low))


def _bracket(
    peak: Callable[[int], int], room: int, power: int, guess: int, limit: int
) -> tuple[int, int, dict[int, int]]:
    """Neighbours between which the peak crosses `room`, 0 and `limit` + 1 among them; and all that was looked at.

    Args:
        power: 1 if the peak is about a + b n, -1 if it is about a + b / n.
    """
    seen: dict[int, int] = {}
    low, high = 0, limit + 1
    while high - low > 1:
        width = high - low
        seen[guess] = peak(guess)
        low, high = (guess, high) if (seen[guess] <= room) == (power > 0) else (low, guess)
        ends = [end for end in (low, high) if end in seen]
        pair = ends if len(ends) == 2 else sorted(seen, key=lambda number: abs(seen[number] - room))[:2]
        crossing = _crossing({number**power: seen[number] for number in pair}, room)
        if high > limit and len(seen) > 1 and not crossing:
            guess = limit  # more does not help, or does not hurt: look at the end at once
        elif crossing and (len(seen) < 4 or 2 * (high - low) < width):
            guess = int(crossing**power)
        else:
            guess = (low + high) // 2 if high <= limit else 2 * guess
        guess = min(max(guess, low + 1), high - 1)
    return low, high, seen


def _crossing(seen: dict[float, int], room: int) -> float | None:
    """Where the line through two points reaches `room`; None with one point, a flat line, or if it never does."""
    if len(seen) < 2:
        return None
    (one, first), (two, second) = seen.items()
    if first == second:
        return None
    crossing = one + (room - first) * (two - one) / (second - first)
    return crossing if crossing > 0 else None
