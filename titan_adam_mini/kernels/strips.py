"""Compiled loops of second moments of columns: sums of squares of rows and columns in one pass, scales of elements.

A strip is PIECE columns of all lines with one outer index: one thread's, so that its columns are added in the order of
the lines whatever the number of threads. Its pieces of lines are joined afterwards, in the order of `loops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import table as t
from .machine import apart, as_like, compiled, inlined, pointer, squares
from .tiles import GIVEN, GRADS, ITEM, PIECE, SCALES, load


@inlined
def _add_columns(values: Any, sums: Any, around: Any, number: int) -> None:
    """Add squares, rounded as `columns.magic` has it."""
    for at in range(number):
        value = np.float64(values[at])
        sums[at] += (value * value + around[at]) - around[at]


@compiled
def sum_strips(row: Any, first: int, number: int, kind: int, native: int, work: Any, like: Any) -> None:
    """Write to COLUMN_SUMS, and to PARTIALS the sums of the lines' pieces: `number` strips from `first` on."""
    apart()
    inner, width, item = row[t.INNER], row[t.WIDTH], work[ITEM]
    pieces, step = (width + PIECE - 1) // PIECE, row[t.GRAD_WIDTH]
    partials, nothing = pointer(row[t.PARTIALS], np.float64), pointer(work[SCALES], np.float64)
    for strip in range(first, first + number):
        outer, piece = strip // pieces, strip % pieces
        at = piece * PIECE
        size = min(PIECE, width - at)
        sums = pointer(row[t.COLUMN_SUMS] + 8 * (outer * width + at), np.float64)
        for column in range(size):
            sums[column] = 0.0
        around = nothing
        if row[t.MAGIC] != 0:
            around = pointer(row[t.MAGIC] + 8 * (outer * width + at), np.float64)
        else:
            for column in range(size):
                nothing[column] = 0.0
        for line in range(inner):
            start = outer * row[t.GRAD_OUTER] + line * row[t.GRAD_INNER] + at * step
            if kind == native and step == 1:
                place = row[t.GRAD] + item * start
            else:
                place = work[GRADS]
                load(pointer(place, like), row[t.GRAD], start, kind, np.int64(1), size, np.int64(0), step)
            values = pointer(place, like)
            partials[(outer * inner + line) * pieces + piece] = squares(values, size, like)
            _add_columns(values, sums, around, size)


@compiled
def join_strips(row: Any, first: int, number: int, like: Any) -> None:
    """Write to OWN_SUMS the sums of `number` lines from `first` on, from those of their pieces."""
    apart()
    pieces = (row[t.WIDTH] + PIECE - 1) // PIECE
    partials, sums = pointer(row[t.PARTIALS], np.float64), pointer(row[t.OWN_SUMS], like)
    for line in range(first, first + number):
        total = 0.0
        for piece in range(line * pieces, line * pieces + pieces):
            total += partials[piece]
        sums[line] = as_like(total, like)


@compiled
def element_scales(
    row: Any, outer: int, at: int, lines: int, size: int, rate: Any, small: Any, work: Any, like: Any
) -> None:
    """Fill GIVEN with what the momentum of a tile's elements is multiplied with; SCALES has the roots of its lines."""
    apart()
    of_lines, scales = pointer(work[SCALES], like), pointer(work[GIVEN], like)
    of_columns = pointer(row[t.COLUMN] + work[ITEM] * (outer * row[t.WIDTH] + at), like)
    for one in range(lines):
        for column in range(size):
            root = as_like(of_lines[one] * of_columns[column], like)
            # As torch divides a number by a tensor.
            scales[one * size + column] = as_like(as_like(1.0 / as_like(root + small, like), like) * rate, like)
