"""Compiled loops of sums of squares: of lines, in the order of `loops`, and of strips of columns.

A strip is PIECE columns of all lines with one outer index: one thread's, so that its columns are added in the order of
the lines whatever the number of threads. Its pieces of lines are joined afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import table as t
from .machine import apart, as_like, compiled, inlined, pointer, squares
from .tiles import GRADS, ITEM, PIECE, ROOM, SCALES, SIDE, TOTALS, load


@inlined
def _line_sums(row: Any, first: int, number: int, target: int, kind: int, native: int, work: Any, like: Any) -> None:
    """Write the sums of squares of `number` own lines from `first` on to `target`, one per line of the reach."""
    inner, width, item = row[t.INNER], row[t.WIDTH], work[ITEM]
    line_step, step = row[t.GRAD_INNER], row[t.GRAD_WIDTH]
    sums, buffer, total = pointer(target, like), pointer(work[GRADS], like), pointer(work[TOTALS], np.float64)
    most = 1 if step == 1 and width > 1 else SIDE
    line = first
    while line < first + number:
        outer, place = line // inner, line % inner
        lines = min(most, first + number - line, inner - place)
        start = outer * row[t.GRAD_OUTER] + place * line_step
        base = row[t.FIRST] + outer * row[t.REACH_INNER] + place
        for one in range(lines):
            total[one] = 0.0
        for at in range(0, width, PIECE):
            size = min(PIECE, width - at)
            if kind == native and step == 1:
                total[0] += squares(pointer(row[t.GRAD] + item * (start + at), like), size, like)
            else:
                load(buffer, row[t.GRAD], start + at * step, kind, lines, size, line_step, step)
                for one in range(lines):
                    total[one] += squares(pointer(work[GRADS] + item * one * size, like), size, like)
        for one in range(lines):
            sums[base + one] = as_like(total[one], like)
        line += lines


@inlined
def _element_sums(row: Any, first: int, number: int, target: int, kind: int, work: Any, like: Any) -> None:
    """`_line_sums` of lines of one element."""
    inner, line_step, one = row[t.INNER], row[t.GRAD_INNER], np.int64(1)
    sums, buffer = pointer(target, like), pointer(work[GRADS], like)
    line = first
    while line < first + number:
        outer, place = line // inner, line % inner
        lines = min(ROOM, first + number - line, inner - place)
        load(buffer, row[t.GRAD], outer * row[t.GRAD_OUTER] + place * line_step, kind, lines, one, line_step, one)
        base = row[t.FIRST] + outer * row[t.REACH_INNER] + place
        for at in range(lines):
            sums[base + at] = buffer[at] * buffer[at]
        line += lines


@compiled
def sum_lines(row: Any, first: int, number: int, target: int, kind: int, native: int, work: Any, like: Any) -> None:
    apart()
    if row[t.WIDTH] == 1:
        _element_sums(row, first, number, target, kind, work, like)
    else:
        _line_sums(row, first, number, target, kind, native, work, like)


# Strips of columns


@inlined
def _add_columns(values: Any, sums: Any, offset: Any, number: int) -> None:
    """Add squares, rounded as `columns.rounding_offset` has it."""
    for at in range(number):
        value = np.float64(values[at])
        sums[at] += (value * value + offset[at]) - offset[at]


@compiled
def sum_strips(row: Any, first: int, number: int, kind: int, native: int, work: Any, like: Any) -> None:
    """Write to COLUMN_SUMS, and to PARTIALS, if there are any, the sums of the lines' pieces: `number` strips from
    `first` on."""
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
        offset = nothing
        if row[t.ROUNDING_OFFSET] != 0:
            offset = pointer(row[t.ROUNDING_OFFSET] + 8 * (outer * width + at), np.float64)
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
            if row[t.PARTIALS] != 0:
                partials[(outer * inner + line) * pieces + piece] = squares(values, size, like)
            _add_columns(values, sums, offset, size)


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
