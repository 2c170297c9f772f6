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
    seen: dict[int, int] = {}
    low, high = 0, limit // unit + 1
    guess = max(1, start // unit)
    while high - low > 1:
        seen[guess] = peak(guess * unit)
        low, high = (guess, high) if seen[guess] <= room else (low, guess)
        line = _crossing({float(number): one for number, one in seen.items()}, room)
        guess = min(max(int(line) if line else 2 * guess, low + 1), high - 1)
    return Found(low * unit if low else None, seen.get(low), seen.get(high))


def fewest(peak: Callable[[int], int], room: int, unit: int, start: int, limit: int) -> Found:
    """The smallest multiple of `unit`, up to `limit`, whose peak is within `room` bytes; `peak` falls."""
    seen: dict[int, int] = {}
    low, high = 0, limit // unit + 1
    guess = max(1, start // unit)
    while high - low > 1:
        seen[guess] = peak(guess * unit)
        low, high = (low, guess) if seen[guess] <= room else (guess, high)
        line = _crossing({1 / number: one for number, one in seen.items()}, room)
        # Where more GPUs do not help, the line never crosses: look at the limit at once.
        wanted = -int(-1 / line // 1) if line and line > 0 else high - 1 if len(seen) > 1 else 2 * guess
        guess = min(max(wanted, low + 1), high - 1)
    fits = high * unit <= limit
    return Found(high * unit if fits else None, seen.get(high), seen.get(low))


def _crossing(seen: dict[float, int], room: int) -> float | None:
    """Where the line through the two points nearest to `room` reaches it; None with one point, or a flat line."""
    if len(seen) < 2:
        return None
    (one, first), (two, second) = sorted(seen.items(), key=lambda point: abs(point[1] - room))[:2]
    return None if first == second else one + (room - first) * (two - one) / (second - first)
