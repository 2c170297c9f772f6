"""Compiled loops of sums of squares: of lines, in the order of `loops`, and of strips of columns.

A strip is PIECE columns of all lines with the same outer index. It is processed by one thread, so that columns are
added in the order of the lines for any number of threads. Sums of pieces of lines are combined afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import table as t
from .machine import as_like, compiled, inlined, never_inline, pointer, squares
from .tiles import BUFFER_SIZE, GRADS, ITEM, PIECE, SCALES, SIDE, TOTALS, load


@inlined
def _line_sums(row: Any, first: int, number: int, target: int, kind: int, native: int, buffers: Any, like: Any) -> None:
    """Write the sums of squares of `number` own lines, starting at `first`, to `target`, one per line of the reach."""
    inner, width, item = row[t.INNER], row[t.WIDTH], buffers[ITEM]
    line_step, step = row[t.GRAD_INNER], row[t.GRAD_WIDTH]
    sums, buffer, total = pointer(target, like), pointer(buffers[GRADS], like), pointer(buffers[TOTALS], np.float64)
    most = 1 if step == 1 and width > 1 else SIDE
    line = first
    while line < first + number:
        outer, place = line // inner, line % inner
        lines = min(most, first + number - line, inner - place)
        start = outer * row[t.GRAD_OUTER] + place * line_step
        base = row[t.FIRST] + outer * row[t.REACH_INNER] + place
        for i in range(lines):
            total[i] = 0.0
        for at in range(0, width, PIECE):
            size = min(PIECE, width - at)
            if kind == native and step == 1:
                total[0] += squares(pointer(row[t.GRAD] + item * (start + at), like), size, like)
            else:
                load(buffer, row[t.GRAD], start + at * step, kind, lines, size, line_step, step)
                for i in range(lines):
                    total[i] += squares(pointer(buffers[GRADS] + item * i * size, like), size, like)
        for i in range(lines):
            sums[base + i] = as_like(total[i], like)
        line += lines


@inlined
def _element_sums(row: Any, first: int, number: int, target: int, kind: int, buffers: Any, like: Any) -> None:
    """`_line_sums` of lines of one element."""
    inner, line_step, unit = row[t.INNER], row[t.GRAD_INNER], np.int64(1)
    sums, buffer = pointer(target, like), pointer(buffers[GRADS], like)
    line = first
    while line < first + number:
        outer, place = line // inner, line % inner
        lines = min(BUFFER_SIZE, first + number - line, inner - place)
        load(buffer, row[t.GRAD], outer * row[t.GRAD_OUTER] + place * line_step, kind, lines, unit, line_step, unit)
        base = row[t.FIRST] + outer * row[t.REACH_INNER] + place
        for at in range(lines):
            sums[base + at] = buffer[at] * buffer[at]
        line += lines


@compiled
def sum_lines(row: Any, first: int, number: int, target: int, kind: int, native: int, buffers: Any, like: Any) -> None:
    never_inline()
    if row[t.WIDTH] == 1:
        _element_sums(row, first, number, target, kind, buffers, like)
    else:
        _line_sums(row, first, number, target, kind, native, buffers, like)


# Strips of columns


@inlined
def _add_columns(values: Any, sums: Any, offset: Any, number: int) -> None:
    """Add squares, rounded with `columns.rounding_offset`."""
    for at in range(number):
        value = np.float64(values[at])
        sums[at] += (value * value + offset[at]) - offset[at]


@compiled
def sum_strips(row: Any, first: int, number: int, kind: int, native: int, buffers: Any, like: Any) -> None:
    """Write column sums of `number` strips, starting at `first`, to COLUMN_SUMS; if PARTIALS is set, also the sums of
    the pieces of lines to it."""
    never_inline()
    inner, width, item = row[t.INNER], row[t.WIDTH], buffers[ITEM]
    pieces, step = (width + PIECE - 1) // PIECE, row[t.GRAD_WIDTH]
    partials, nothing = pointer(row[t.PARTIALS], np.float64), pointer(buffers[SCALES], np.float64)
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
                place = buffers[GRADS]
                load(pointer(place, like), row[t.GRAD], start, kind, np.int64(1), size, np.int64(0), step)
            values = pointer(place, like)
            if row[t.PARTIALS] != 0:
                partials[(outer * inner + line) * pieces + piece] = squares(values, size, like)
            _add_columns(values, sums, offset, size)


@compiled
def join_strips(row: Any, first: int, number: int, like: Any) -> None:
    """Write the sums of `number` lines, starting at `first`, to OWN_SUMS, from those of their pieces."""
    never_inline()
    pieces = (row[t.WIDTH] + PIECE - 1) // PIECE
    partials, sums = pointer(row[t.PARTIALS], np.float64), pointer(row[t.OWN_SUMS], like)
    for line in range(first, first + number):
        total = 0.0
        for piece in range(line * pieces, line * pieces + pieces):
            total += partials[piece]
        sums[line] = as_like(total, like)
