"""The compiled loops of the CPU engine: numba functions that read a `Table` and process a list of units.

All data are accessed by address, so that the code is compiled only once per dtype of arithmetic. Tensors of another
dtype, or that are not contiguous, go through small buffers that stay in the cache.

The order of summation is defined here and in `machine.square_lanes`, and fast-math is off, so the compiler cannot
change it: a line is cut into pieces of PIECE elements, a piece is added in LANES parallel sums, which are then halved,
then the remaining elements; pieces, and the lines of a block, are added sequentially in float64. The order depends on
the length alone.
"""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import numpy as np

from . import int8, machine, rounding, sums, tiles
from . import table as t
from .machine import (
    LANES,
    as_like,
    compiled,
    entry,
    inlined,
    mix,
    never_inline,
    next_number,
    pointer,
    salt,
    stochastic,
    update_lanes,
)
from .sums import join_strips, sum_lines, sum_strips
from .tiles import (
    AVERAGES,
    BFLOAT16,
    BUFFER_SIZE,
    ELEMENT_SCALES,
    GRADS,
    INT8,
    ITEM,
    PARAMS,
    RUN,
    SCALES,
    SIDE,
    UPDATE_TILE,
    dequantize,
    load,
    quantize,
    store,
)

COHORT = 8192
"""Number of elements whose lines are summed before they are updated."""

ROW, START, NUMBER, KIND = range(4)
"""Columns of a unit: row of the table, first line (or block), number of them, and the operation."""
SUM, FOLDED, ZERO, UPDATE, ONE_PASS, STRIP, JOIN = range(7)
"""Operations: sums of lines; moments of blocks from such sums, or from zeros; update of lines; all of these in one pass
over blocks; for matrices by columns, sums of strips, and sums of lines from those."""

ACTIVE, RATE, ROOT, KEEP1, NEW1, KEEP2, NEW2, SMALL, SHRINK, KEY, NUMBERS = range(11)
"""Columns of the scalars of a parameter's step (see `prepare`), and their number."""


def _stamp() -> int:
    """A checksum of all files whose constants and functions are compiled here."""
    try:
        return zlib.crc32("".join(map(inspect.getsource, (t, machine, tiles, sums, int8, rounding))).encode())
    except OSError:  # no source files: numba has no cache either
        return 0


# Moments


@inlined
def _span(row: Any, block: int, tile: int) -> Any:
    """The range of a block's sums: `tile` of them, or as given by STARTS."""
    if tile > 0:
        return block * tile, block * tile + tile
    starts = pointer(row[t.STARTS], np.int32)
    return np.int64(starts[block]), np.int64(starts[block + 1])


@compiled
def _scale(row: Any, numbers: Any, block: int, total: float, like: Any) -> Any:
    """Advance the second moment of a block; returns the factor for its momentum."""
    never_inline()
    count = row[t.COUNT]
    if count == 0:
        count = pointer(row[t.COUNTS], np.int64)[block]
    moments = pointer(row[t.EXP_AVG_SQ], like)
    mean = as_like(total, like) / as_like(count, like)
    moment = as_like(moments[block] * as_like(numbers[KEEP2], like) + mean * as_like(numbers[NEW2], like), like)
    moments[block] = moment
    root = as_like(np.sqrt(moment / as_like(numbers[ROOT], like)), like)
    # torch divides a number by a tensor in this way; so do we, to match the reference bit for bit except for sums.
    return as_like(
        as_like(as_like(1.0, like) / (root + as_like(numbers[SMALL], like)), like) * as_like(numbers[RATE], like), like
    )


@inlined
def _folded(row: Any, block: int, tile: int, like: Any) -> float:
    start, stop = _span(row, block, tile)
    sums = pointer(row[t.SUMS], like)
    total = 0.0
    for at in range(start, stop):
        total += sums[at]
    return total


# Updates


@compiled
def _update(param: Any, grad: Any, exp_avg: Any, number: int, numbers: Any, scale: Any, ahead: int, like: Any) -> None:
    """Update the momentum and parameters of one block, which are contiguous."""
    never_inline()
    keep, new, shrink = as_like(numbers[KEEP1], like), as_like(numbers[NEW1], like), as_like(numbers[SHRINK], like)
    even = number // LANES * LANES
    update_lanes(param, grad, exp_avg, even, keep, new, shrink, scale, ahead)
    for at in range(even, number):
        average = exp_avg[at] * keep + grad[at] * new
        exp_avg[at] = average
        param[at] = param[at] * shrink - average * scale


@compiled
def _update_elements(param: Any, grad: Any, exp_avg: Any, number: int, numbers: Any, scales: Any, like: Any) -> None:
    """`_update` with a scale for every element."""
    never_inline()
    keep, new, shrink = as_like(numbers[KEEP1], like), as_like(numbers[NEW1], like), as_like(numbers[SHRINK], like)
    even = number // LANES * LANES
    update_lanes(param, grad, exp_avg, even, keep, new, shrink, scales, number)
    for at in range(even, number):
        average = exp_avg[at] * keep + grad[at] * new
        exp_avg[at] = average
        param[at] = param[at] * shrink - average * scales[at]


@compiled
def _element_scales(
    row: Any, outer: int, at: int, lines: int, size: int, rate: Any, small: Any, buffers: Any, like: Any
) -> None:
    """Fill ELEMENT_SCALES with the factors for the momentum of a tile; SCALES has the roots of its lines."""
    never_inline()
    of_lines, scales = pointer(buffers[SCALES], like), pointer(buffers[ELEMENT_SCALES], like)
    of_columns = pointer(row[t.COLUMN] + buffers[ITEM] * (outer * row[t.WIDTH] + at), like)
    for i in range(lines):
        for column in range(size):
            root = as_like(of_lines[i] * of_columns[column], like)
            # As torch divides a number by a tensor.
            scales[i * size + column] = as_like(as_like(1.0 / as_like(root + small, like), like) * rate, like)


@compiled
def _store_random(row: Any, numbers: Any, outer: int, place: int, at: int, lines: int, size: int, buffer: Any) -> None:
    """Round a tile of parameters stochastically; it begins at position `at` of the own line (outer, place)."""
    never_inline()
    key, step = np.uint32(np.int64(numbers[KEY])), row[t.PARAM_OUTER + 2]
    for i in range(lines):
        line = place + i
        start = outer * row[t.PARAM_OUTER] + line * row[t.PARAM_OUTER + 1] + at * step
        target = pointer(row[t.PARAM] + 2 * start, np.uint16)
        first = row[t.INDEX] + outer * row[t.INDEX + 1] + line * row[t.INDEX + 2] + at * row[t.INDEX + 3]
        salted, apart_by = salt(first, key), np.uint32(row[t.INDEX + 3])
        same = first >> 32 == (first + (size - 1) * row[t.INDEX + 3]) >> 32
        for more in range(size if same else 0):
            low = np.uint32(np.uint32(first) + np.uint32(np.uint32(more) * apart_by))
            target[more * step] = stochastic(buffer[i * size + more], low, salted)
        for more in range(0 if same else size):
            index = first + more * row[t.INDEX + 3]
            target[more * step] = stochastic(buffer[i * size + more], np.uint32(index), salt(index, key))


@compiled
def _taken(
    buffer: int, tensor: int, start: int, kind: int, native: int, lines: int, size: int, line: int, step: int, like: Any
) -> int:
    """The address of a tile's values: in the tensor if dtype and layout fit, else in the buffer, which is filled."""
    never_inline()
    if kind == native and ((lines == 1 and step == 1) or (size == 1 and line == 1)):
        return tensor + like.itemsize * start
    load(pointer(buffer, like), tensor, start, kind, lines, size, line, step)
    return buffer


@inlined
def _update_tile(
    row: Any, numbers: Any, line: int, at: int, lines: int, size: int, kinds: Any, native: int, buffers: Any, like: Any
) -> None:
    """Update a tile through the buffers; `buffers[SCALES]` has the scale of every line."""
    inner = row[t.INNER]
    outer, place = line // inner, line % inner
    p_line, g_line, m_line = row[t.PARAM_OUTER + 1], row[t.GRAD_OUTER + 1], row[t.EXP_AVG_OUTER + 1]
    p_step, g_step, m_step = row[t.PARAM_OUTER + 2], row[t.GRAD_OUTER + 2], row[t.EXP_AVG_OUTER + 2]
    p = outer * row[t.PARAM_OUTER] + place * p_line + at * p_step
    g = outer * row[t.GRAD_OUTER] + place * g_line + at * g_step
    m = outer * row[t.EXP_AVG_OUTER] + place * m_line + at * m_step
    param = _taken(buffers[PARAMS], row[t.PARAM], p, kinds[0], native, lines, size, p_line, p_step, like)
    grad = _taken(buffers[GRADS], row[t.GRAD], g, kinds[1], native, lines, size, g_line, g_step, like)
    exp_avg = _taken(buffers[AVERAGES], row[t.EXP_AVG], m, kinds[2], native, lines, size, m_line, m_step, like)
    item, scales = buffers[ITEM], pointer(buffers[SCALES], like)
    runs = row[t.EXP_AVG_SCALE] + 4 * ((line * row[t.WIDTH] + at) // RUN)  # inside rows: see `Compiled.fallback`
    every = 4 * (row[t.WIDTH] // RUN)
    for i in range(lines if kinds[2] == INT8 else 0):
        dequantize(pointer(exp_avg + item * i * size, like), pointer(runs + i * every, np.float32), size)
    if size == 1 or row[t.COLUMN] != 0:
        values, average = pointer(param, like), pointer(exp_avg, like)
        if row[t.COLUMN] != 0:
            rate, small = as_like(numbers[RATE], like), as_like(numbers[SMALL], like)
            _element_scales(row, outer, at, lines, size, rate, small, buffers, like)
            scales = pointer(buffers[ELEMENT_SCALES], like)
        _update_elements(values, pointer(grad, like), average, lines * size, numbers, scales, like)
    else:
        for i in range(lines):
            skip = item * i * size
            values, average = pointer(param + skip, like), pointer(exp_avg + skip, like)
            _update(values, pointer(grad + skip, like), average, size, numbers, scales[i], size, like)
    for i in range(lines if kinds[2] == INT8 else 0):
        quantize(pointer(exp_avg + item * i * size, like), pointer(runs + i * every, np.float32), size)
    if exp_avg == buffers[AVERAGES]:
        store(pointer(exp_avg, like), row[t.EXP_AVG], m, kinds[2], lines, size, m_line, m_step)
    if kinds[0] == BFLOAT16 and row[t.SEED] >= 0:
        _store_random(row, numbers, outer, place, at, lines, size, pointer(param, like))
    elif param == buffers[PARAMS]:
        store(pointer(param, like), row[t.PARAM], p, kinds[0], lines, size, p_line, p_step)


@compiled
def _update_lines(
    row: Any,
    numbers: Any,
    first: int,
    number: int,
    given: int,
    every: int,
    kinds: Any,
    native: int,
    buffers: Any,
    like: Any,
) -> None:
    """Update `number` own lines from `first` on.

    The scale of a line is `given[every * (line - first)]`, or that of its block if `given` is 0.
    """
    never_inline()
    inner, width, item = row[t.INNER], row[t.WIDTH], buffers[ITEM]
    scales, of_block, of_line = (
        pointer(buffers[SCALES], like),
        pointer(row[t.SCALE], like),
        pointer(row[t.BLOCK_OF_LINE], np.int32),
    )
    steps = row[t.PARAM_OUTER + 2] == 1 and row[t.GRAD_OUTER + 2] == 1 and row[t.EXP_AVG_OUTER + 2] == 1
    direct = (
        steps and row[t.COLUMN] == 0 and width > 1 and kinds[0] == native and kinds[1] == native and kinds[2] == native
    )
    if width == 1:
        most, longest = UPDATE_TILE, 1
    elif row[t.PARAM_OUTER + 2] == 1 or kinds[2] == INT8:
        most, longest = 1, UPDATE_TILE
    else:
        most, longest = SIDE, UPDATE_TILE // SIDE
    line = first
    while line < first + number:
        outer, place = line // inner, line % inner
        lines = min(most, first + number - line, inner - place)
        base = row[t.FIRST] + outer * row[t.REACH_INNER] + place
        for i in range(lines):
            if given:
                scales[i] = pointer(given, like)[every * (line - first + i)]
            else:
                scales[i] = of_block[(base + i) // row[t.TILE] if row[t.TILE] else np.int64(of_line[base + i])]
        if direct:
            p = row[t.PARAM] + item * (outer * row[t.PARAM_OUTER] + place * row[t.PARAM_OUTER + 1])
            g = row[t.GRAD] + item * (outer * row[t.GRAD_OUTER] + place * row[t.GRAD_OUTER + 1])
            m = row[t.EXP_AVG] + item * (outer * row[t.EXP_AVG_OUTER] + place * row[t.EXP_AVG_OUTER + 1])
            _update(
                pointer(p, like),
                pointer(g, like),
                pointer(m, like),
                width,
                numbers,
                scales[0],
                max(width, every * number * width),
                like,
            )
        else:
            for at in range(0, width, longest):
                _update_tile(row, numbers, line, at, lines, min(longest, width - at), kinds, native, buffers, like)
        line += lines


@inlined
def _update_blocks(
    row: Any, numbers: Any, first: int, number: int, kinds: Any, native: int, buffers: Any, like: Any
) -> None:
    """Sums, moments and update of `number` blocks that are complete here; gradients are re-read from the cache."""
    item = buffers[ITEM]
    if row[t.TILE] != 1:
        scale = pointer(buffers[ELEMENT_SCALES], like)
        for block in range(first, first + number):
            start, stop = _span(row, block, row[t.TILE])
            sum_lines(row, start, stop - start, row[t.OWN_SUMS], kinds[1], native, buffers, like)
            scale[0] = _scale(row, numbers, block, _folded(row, block, row[t.TILE], like), like)
            _update_lines(
                row, numbers, start, stop - start, buffers[ELEMENT_SCALES], np.int64(0), kinds, native, buffers, like
            )
        return
    scales = pointer(buffers[ELEMENT_SCALES], like)
    together = min(BUFFER_SIZE, max(SIDE if row[t.GRAD_WIDTH] != 1 else 1, COHORT // row[t.WIDTH]))
    for start in range(first, first + number, together):
        lines = min(together, first + number - start)
        sum_lines(row, start, lines, buffers[ELEMENT_SCALES] - item * start, kinds[1], native, buffers, like)
        for i in range(lines):
            scales[i] = _scale(row, numbers, start + i, np.float64(scales[i]), like)
        _update_lines(row, numbers, start, lines, buffers[ELEMENT_SCALES], np.int64(1), kinds, native, buffers, like)


# Entry points from Python


def _entries(stamp: int) -> tuple[Any, Any]:
    """`prepare` and `run`, closed over `stamp`.

    The key of numba's disk cache includes this file and the closure of an entry point, but no constants of other files.
    """

    def prepare(rows: Any, hyper: Any, active: Any, numbers: Any) -> None:
        """Advance the step of every active parameter, and write the scalars shared by its blocks into `numbers`."""
        for number in range(len(rows) if stamp >= 0 else 0):
            row, values, own = rows[number], hyper[rows[number, t.GROUP]], numbers[number]
            own[ACTIVE] = active[number]
            if not active[number]:
                continue
            steps = pointer(row[t.STEP], np.float32)
            steps[0] += np.float32(1)
            step = np.float64(steps[0])
            own[RATE], own[ROOT] = values[t.LR] / (1 - values[t.BETA1] ** step), 1 - values[t.BETA2] ** step
            own[KEEP1], own[NEW1] = values[t.BETA1], 1 - values[t.BETA1]
            if values[t.MAXIMIZE]:
                own[NEW1] = -own[NEW1]
            own[KEEP2], own[NEW2], own[SMALL] = values[t.BETA2], 1 - values[t.BETA2], values[t.EPS]
            own[SHRINK] = 1 - values[t.LR] * values[t.WEIGHT_DECAY] if row[t.DECAY] else 1.0
            own[KEY] = mix(np.uint32(np.uint64(row[t.SEED]) + np.uint64(step) * np.uint64(rounding.GOLDEN)))

    def run(
        rows: Any, units: Any, counter: int, numbers: Any, kinds: Any, native: int, buffers: Any, like: Any
    ) -> None:
        """Process units of one phase until none is left; several threads may do so, each with its own `buffers`."""
        while stamp >= 0:
            at = next_number(counter)
            if at >= len(units):
                break
            first, number, kind = units[at, START], units[at, NUMBER], units[at, KIND]
            row, own = rows[units[at, ROW]], numbers[units[at, ROW]]
            if kind == SUM:
                sum_lines(row, first, number, row[t.OWN_SUMS], kinds[1], native, buffers, like)
            elif kind == STRIP:
                sum_strips(row, first, number, kinds[1], native, buffers, like)
            elif kind == JOIN:
                join_strips(row, first, number, like)
            elif own[ACTIVE] == 0:
                continue
            elif kind == ONE_PASS:
                _update_blocks(row, own, first, number, kinds, native, buffers, like)
            elif kind == UPDATE:
                _update_lines(row, own, first, number, np.int64(0), np.int64(0), kinds, native, buffers, like)
            else:
                scales = pointer(row[t.SCALE], like)
                for block in range(first, first + number):
                    total = 0.0 if kind == ZERO else _folded(row, block, row[t.FOLD], like)
                    scale = _scale(row, own, block, total, like)
                    if row[t.GRAD]:
                        scales[block] = scale

    return entry(prepare), entry(run)


prepare, run = _entries(_stamp())
