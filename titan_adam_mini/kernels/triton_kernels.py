"""The kernels of the fused engine for GPUs, in Triton; `triton.py` launches them.

All of them read the table of `kernels.table` on the device. A program processes a tile of [lines, columns] of one
parameter, given by the list `programs`, int32 [programs, 3]: row of the table, outer index, first line. Sums of squares
are added in an order that depends on the length of a line alone, and there is no fused multiply-add, so that the result
for an element does not depend on its position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import int8, rounding, table

_COLUMNS = tl.constexpr(table.COLUMNS)
_PARAM, _GRAD, _EXP_AVG = tl.constexpr(table.PARAM), tl.constexpr(table.GRAD), tl.constexpr(table.EXP_AVG)
_EXP_AVG_SCALE, _EXP_AVG_SQ = tl.constexpr(table.EXP_AVG_SCALE), tl.constexpr(table.EXP_AVG_SQ)
_STEP, _PRESENT, _GROUP = tl.constexpr(table.STEP), tl.constexpr(table.PRESENT), tl.constexpr(table.GROUP)
_OWN_SUMS, _SUMS, _SCALE = tl.constexpr(table.OWN_SUMS), tl.constexpr(table.SUMS), tl.constexpr(table.SCALE)
_BLOCK_OF_LINE, _STARTS = tl.constexpr(table.BLOCK_OF_LINE), tl.constexpr(table.STARTS)
_COUNTS, _COUNT = tl.constexpr(table.COUNTS), tl.constexpr(table.COUNT)
_COLUMN = tl.constexpr(table.COLUMN)
_DECAY, _SEED, _INNER, _WIDTH = (tl.constexpr(column) for column in (table.DECAY, table.SEED, table.INNER, table.WIDTH))
_FIRST, _REACH_INNER = tl.constexpr(table.FIRST), tl.constexpr(table.REACH_INNER)
_BLOCKS, _TILE, _FOLD = tl.constexpr(table.BLOCKS), tl.constexpr(table.TILE), tl.constexpr(table.FOLD)
_INDEX = tl.constexpr(table.INDEX)
_PARAM_OUTER, _GRAD_OUTER = tl.constexpr(table.PARAM_OUTER), tl.constexpr(table.GRAD_OUTER)
_EXP_AVG_OUTER = tl.constexpr(table.EXP_AVG_OUTER)
_LR, _BETA1, _BETA2, _EPS = (tl.constexpr(column) for column in (table.LR, table.BETA1, table.BETA2, table.EPS))
_WEIGHT_DECAY, _MAXIMIZE = tl.constexpr(table.WEIGHT_DECAY), tl.constexpr(table.MAXIMIZE)
_LOG_BETA1, _LOG_BETA2 = tl.constexpr(table.LOG_BETA1), tl.constexpr(table.LOG_BETA2)
_RUN, _TINY = tl.constexpr(int8.RUN), tl.constexpr(int8.TINY)
_GOLDEN, _MIX1, _MIX2 = (tl.constexpr(number) for number in (rounding.GOLDEN, rounding.FIRST, rounding.SECOND))
SCALARS = 10
_SCALARS = tl.constexpr(SCALARS)


@triton.jit
def prepare(rows, hyper, scalars, number, BLOCK: tl.constexpr):
    """Per parameter: advance `step` if any rank has a gradient, and compute the scalars of the other kernels, float32.

    Columns of `scalars`: lr / (1 - beta1^t), 1 - beta2^t, decay, beta1, +-(1 - beta1), beta2, 1 - beta2, eps, whether
    any rank has a gradient, t.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < number
    row = rows + i.to(tl.int64) * _COLUMNS
    present = tl.load(row + _PRESENT, here, other=0)
    ranks = tl.load(present.to(tl.pointer_type(tl.float32)), here & (present != 0), other=1.0)
    active = here & (ranks > 0)
    steps = tl.load(row + _STEP, here, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, here, other=0.0) + 1.0
    tl.store(steps, step, active)

    group = hyper + tl.load(row + _GROUP, here, other=0) * 8
    lr, beta1 = tl.load(group + _LR, here, other=0.0), tl.load(group + _BETA1, here, other=0.0)
    beta2, eps = tl.load(group + _BETA2, here, other=0.0), tl.load(group + _EPS, here, other=0.0)
    decays = tl.load(row + _DECAY, here, other=0) != 0
    decay = tl.where(decays, 1.0 - lr * tl.load(group + _WEIGHT_DECAY, here, other=0.0), 1.0)
    sign = tl.where(tl.load(group + _MAXIMIZE, here, other=0.0) != 0.0, -1.0, 1.0)
    wide = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(wide * tl.load(group + _LOG_BETA1, here, other=-1.0))
    correction2 = 1.0 - tl.exp(wide * tl.load(group + _LOG_BETA2, here, other=-1.0))
    out = scalars + i * _SCALARS
    tl.store(out, (lr / correction1).to(tl.float32), here)
    tl.store(out + 1, correction2.to(tl.float32), here)
    tl.store(out + 2, decay.to(tl.float32), here)
    tl.store(out + 3, beta1.to(tl.float32), here)
    tl.store(out + 4, (sign * (1.0 - beta1)).to(tl.float32), here)
    tl.store(out + 5, beta2.to(tl.float32), here)
    tl.store(out + 6, (1.0 - beta2).to(tl.float32), here)
    tl.store(out + 7, eps.to(tl.float32), here)
    tl.store(out + 8, active.to(tl.float32), here)
    tl.store(out + 9, step, here)


@triton.jit
def _place(rows, programs):
    """The tile of this program: row of the table and its number, outer index, first line."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(program).to(tl.int64)
    return rows + number * _COLUMNS, number, tl.load(program + 1).to(tl.int64), tl.load(program + 2).to(tl.int64)


@triton.jit
def _mix(x):
    """See `rounding.mix`; uint32."""
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return x ^ (x >> 16)


@triton.jit
def _rounded(value, TYPE: tl.constexpr, index, seed, step, ROUND: tl.constexpr):
    """`value` as TYPE; bfloat16 to nearest even, or stochastically as in `rounding.stochastic`."""
    if tl.bfloat16 == TYPE:
        bits = value.to(tl.int32, bitcast=True)
        if ROUND:
            key = _mix(seed.to(tl.uint32) + step.to(tl.uint32) * _GOLDEN)
            high = _mix((index >> 32).to(tl.uint32) + _GOLDEN)
            up = (_mix(index.to(tl.uint32) ^ key ^ high) & 0xFFFF).to(tl.int32)
        else:
            up = 0x7FFF + ((bits >> 16) & 1)
        finite = (bits & 0x7F800000) != 0x7F800000
        value = tl.where(finite, (bits + up) & -65536, bits).to(tl.float32, bitcast=True)
    return value.to(TYPE)


@triton.jit
def _at(row, column: tl.constexpr, TYPE: tl.constexpr, outer, line, columns, UNIT: tl.constexpr):
    """Pointers [lines, columns] into param, gradient or momentum.

    UNIT: the dim of stride 1, 2 for none.
    """
    base = tl.load(row + column[0]).to(tl.pointer_type(TYPE))
    start = outer * tl.load(row + column[1])
    step = tl.load(row + column[1] + 1)
    if UNIT == 0:
        return base + start + line[:, None] + columns[None, :] * tl.load(row + column[1] + 2)
    elif UNIT == 1:
        return base + (start + line * step)[:, None] + columns[None, :]
    else:
        return base + (start + line * step)[:, None] + columns[None, :] * tl.load(row + column[1] + 2)


@triton.jit
def _gradient(row, outer, line, live, at, width, G: tl.constexpr, UNIT: tl.constexpr):
    """A tile of the gradient, float32."""
    where = _at(row, (_GRAD, _GRAD_OUTER), G, outer, line, at, UNIT)
    return tl.load(where, live[:, None] & (at < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _sums(row, outer, line, live, width, G: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Sums of squares of the gradient's lines, float32 [LINES].

    The order depends on `width` alone: the compiler gets no alignment hints, which could change the order.
    """
    total = tl.zeros([LINES, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        g = _gradient(row, outer, line, live, start + tl.arange(0, WIDTH).to(tl.int64), width, G, UNIT)
        total += g * g
    return tl.sum(total, 1)


@triton.jit
def _store_param(where, p, mask, row, numbers, outer, line, column, P: tl.constexpr, ROUND: tl.constexpr):
    """Round and store a tile of the parameter; `line` and `column` are those of its elements."""
    if ROUND:
        index = tl.load(row + _INDEX) + outer * tl.load(row + _INDEX + 1)
        index += line * tl.load(row + _INDEX + 2) + column * tl.load(row + _INDEX + 3)
        tl.store(where, _rounded(p, P, index, tl.load(row + _SEED), tl.load(numbers + 9), True), mask)
    else:
        tl.store(where, _rounded(p, P, 0, 0, 0, False), mask)


@triton.jit
def _scales(row, numbers, outer, column, mask, scale, BY_COLUMNS: tl.constexpr):
    """The factors for the momentum of a tile; with BY_COLUMNS, `scale` has the roots of its lines.

    `column`, `mask` and `scale` broadcast; the columns are those of the tile.
    """
    if BY_COLUMNS:
        roots = tl.load(row + _COLUMN).to(tl.pointer_type(tl.float32)) + outer * tl.load(row + _WIDTH)
        root = scale * tl.load(roots + column, mask, other=1.0) + tl.load(numbers + 7)
        scale = tl.div_rn(tl.zeros_like(root) + tl.load(numbers), root)
    return scale


@triton.jit
def _update_tile(row, numbers, outer, line, live, at, width, scale, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                 ROUND: tl.constexpr, UNIT: tl.constexpr, BY_COLUMNS: tl.constexpr):  # fmt: skip
    """Momentum and parameter of one tile; `scale` is float32 [lines]."""
    decay, momentum, weight = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    mask = live[:, None] & (at < width)[None, :]
    g = _gradient(row, outer, line, live, at, width, G, UNIT)
    where = _at(row, (_EXP_AVG, _EXP_AVG_OUTER), M, outer, line, at, UNIT)
    m = tl.load(where, mask, other=0.0).to(tl.float32) * momentum + g * weight
    tl.store(where, _rounded(m, M, 0, 0, 0, False), mask)
    where = _at(row, (_PARAM, _PARAM_OUTER), P, outer, line, at, UNIT)
    each = _scales(row, numbers, outer, at[None, :], (at < width)[None, :], scale[:, None], BY_COLUMNS)
    p = tl.load(where, mask, other=0.0).to(tl.float32) * decay - m * each
    _store_param(where, p, mask, row, numbers, outer, line[:, None], at[None, :], P, ROUND)


@triton.jit
def _update_runs(row, numbers, outer, line, start, width, scale, P: tl.constexpr, G: tl.constexpr, ROUND: tl.constexpr,
                 RUNS: tl.constexpr, BY_COLUMNS: tl.constexpr):  # fmt: skip
    """As `_update_tile`, for one line with int8 momentum in tiles of [runs, columns of a run]; see `int8.quantize`."""
    decay, momentum, weight = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    run = start // _RUN + tl.arange(0, RUNS)
    live = run < width // _RUN
    mask = live[:, None]
    column = run.to(tl.int64)[:, None] * _RUN + tl.arange(0, _RUN).to(tl.int64)[None, :]
    number = outer * tl.load(row + _INNER) + line
    scales = tl.load(row + _EXP_AVG_SCALE).to(tl.pointer_type(tl.float32)) + number * (width // _RUN) + run
    # Without the hints a thread would read one byte at a time.
    values = tl.multiple_of(tl.load(row + _EXP_AVG).to(tl.pointer_type(tl.int8)), 16)
    where = values + tl.multiple_of(number * width, 16) + column
    at_g = tl.load(row + _GRAD).to(tl.pointer_type(G)) + column
    at_g += outer * tl.load(row + _GRAD_OUTER) + line * tl.load(row + _GRAD_OUTER + 1)
    at_p = tl.load(row + _PARAM).to(tl.pointer_type(P)) + column
    at_p += outer * tl.load(row + _PARAM_OUTER) + line * tl.load(row + _PARAM_OUTER + 1)

    g = tl.load(at_g, mask, other=0.0).to(tl.float32)
    old = tl.load(scales, live, other=0.0)
    m = tl.load(where, mask, other=0).to(tl.float32) * old[:, None] * momentum + g * weight
    each = _scales(row, numbers, outer, column, mask, scale, BY_COLUMNS)
    p = tl.load(at_p, mask, other=0.0).to(tl.float32) * decay - m * each
    _store_param(at_p, p, mask, row, numbers, outer, line, column, P, ROUND)
    wrong = tl.max((m != m).to(tl.int32), 1) != 0
    absmax = tl.where(wrong, float("nan"), tl.max(tl.abs(m), 1))
    full = tl.full([RUNS], 127.0, tl.float32)
    inverse = tl.where(absmax >= _TINY, tl.div_rn(full, absmax), 0.0)
    q = m * inverse[:, None]
    q = (tl.where(q == q, q, 0.0) + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounded half to even
    tl.store(where, q.to(tl.int8), mask)
    tl.debug_barrier()  # every thread has read the old scale
    tl.store(scales, tl.where(absmax < _TINY, 0.0, tl.div_rn(absmax, full)), live)


@triton.jit
def _update(row, numbers, outer, line, live, width, scale, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
            ROUND: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
            BY_COLUMNS: tl.constexpr):  # fmt: skip
    """Momentum and parameter of full lines; `scale` is float32 [LINES]."""
    for start in range(0, width, WIDTH):
        if tl.int8 == M:
            tl.static_assert(LINES == 1)
            one, only = tl.sum(line, 0), tl.sum(scale, 0)
            _update_runs(row, numbers, outer, one, start, width, only, P, G, ROUND, WIDTH // _RUN, BY_COLUMNS)
        else:
            at = start + tl.arange(0, WIDTH).to(tl.int64)
            _update_tile(row, numbers, outer, line, live, at, width, scale, P, G, M, ROUND, UNIT, BY_COLUMNS)


@triton.jit
def _moved(moments, live, mean, numbers):
    """Second moments, advanced by a step."""
    v = tl.load(moments, live, other=0.0) * tl.load(numbers + 5) + mean * tl.load(numbers + 6)
    tl.debug_barrier()  # several threads read the same moment before it is advanced
    tl.store(moments, v, live)
    return v


@triton.jit
def _moment(row, numbers, block, live, total):
    """Advance the second moments of blocks with sums `total`; returns the factors for momentum, float32 [blocks]."""
    count = tl.load(row + _COUNT)
    if count == 0:
        counts = tl.load(row + _COUNTS).to(tl.pointer_type(tl.int64)) + block
        mean = tl.div_rn(total, tl.load(counts, live, other=1).to(tl.float32))
    else:
        mean = tl.div_rn(total, tl.zeros_like(total) + count.to(tl.float32))
    v = _moved(tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + block, live, mean, numbers)
    root = tl.sqrt_rn(tl.div_rn(v, tl.zeros_like(v) + tl.load(numbers + 1)))
    return tl.div_rn(tl.zeros_like(v) + tl.load(numbers), root + tl.load(numbers + 7))


@triton.jit
def _whole(row, numbers, outer, first, width, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
           LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Sums, second moments and update of LINES blocks of one line."""
    line = first + tl.arange(0, LINES)
    live = line < tl.load(row + _INNER)
    block = tl.load(row + _FIRST) + outer * tl.load(row + _REACH_INNER) + line
    total = _sums(row, outer, line, live, width, G, LINES, WIDTH, UNIT)
    scale = _moment(row, numbers, block, live, total)
    _update(row, numbers, outer, line, live, width, scale, P, G, M, ROUND, LINES, WIDTH, UNIT, False)


@triton.jit
def _own_sums(row, outer, first, width, G: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Write the sums of squares of LINES lines, for the exchange or the fold."""
    line = first + tl.arange(0, LINES)
    live = line < tl.load(row + _INNER)
    total = _sums(row, outer, line, live, width, G, LINES, WIDTH, UNIT)
    sums = tl.load(row + _OWN_SUMS).to(tl.pointer_type(tl.float32))
    tl.store(sums + tl.load(row + _FIRST) + outer * tl.load(row + _REACH_INNER) + line, total, live)


@triton.jit
def _scaled(row, numbers, outer, first, width, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
            LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BY_COLUMNS: tl.constexpr):  # fmt: skip
    """Update LINES lines with the scales that the fold wrote for their blocks, or the roots of lines and columns."""
    line = first + tl.arange(0, LINES)
    live = line < tl.load(row + _INNER)
    there = tl.load(row + _FIRST) + outer * tl.load(row + _REACH_INNER) + line
    tile = tl.load(row + _TILE)
    block = there
    if tile == 0:
        blocks = tl.load(row + _BLOCK_OF_LINE).to(tl.pointer_type(tl.int32))
        block = tl.load(blocks + there, live, other=0).to(tl.int64)
    else:
        block = there // tile
    scale = tl.load(tl.load(row + _SCALE).to(tl.pointer_type(tl.float32)) + block, live, other=0.0)
    _update(row, numbers, outer, line, live, width, scale, P, G, M, ROUND, LINES, WIDTH, UNIT, BY_COLUMNS)


# The three kernels of lines. NARROW is for lines of up to 64 elements, mostly norms and biases: handling both in one
# kernel would cost registers, and a quarter of its speed.

NARROW = 64
_NARROW = tl.constexpr(NARROW)


@triton.jit
def one_line_blocks(rows, scalars, programs, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
                    UNIT: tl.constexpr, NARROW: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Blocks of one line that are complete here: all in one pass; the gradient is re-read from the cache."""
    row, number, outer, first = _place(rows, programs)
    numbers, width = scalars + number * _SCALARS, tl.load(row + _WIDTH)
    if tl.int8 == M:
        _whole(row, numbers, outer, first, width, P, G, M, ROUND, 1, TILE // 2, UNIT)
    elif UNIT == 0:
        _whole(row, numbers, outer, first, width, P, G, M, ROUND, 64, 64, UNIT)
    elif not NARROW:
        _whole(row, numbers, outer, first, width, P, G, M, ROUND, 1, TILE, UNIT)
    elif width == 1:
        _whole(row, numbers, outer, first, width, P, G, M, ROUND, TILE // 2, 1, UNIT)
    else:
        _whole(row, numbers, outer, first, width, P, G, M, ROUND, TILE // _NARROW, _NARROW, UNIT)


@triton.jit
def line_sums(
    rows, programs, G: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, TILE: tl.constexpr
):
    """One sum of squares per line."""
    row, _, outer, first = _place(rows, programs)
    width = tl.load(row + _WIDTH)
    if tl.int8 == M:
        _own_sums(row, outer, first, width, G, 1, TILE // 2, UNIT)
    elif UNIT == 0:
        _own_sums(row, outer, first, width, G, 64, 64, UNIT)
    elif not NARROW:
        _own_sums(row, outer, first, width, G, 1, TILE, UNIT)
    elif width == 1:
        _own_sums(row, outer, first, width, G, TILE // 2, 1, UNIT)
    else:
        _own_sums(row, outer, first, width, G, TILE // _NARROW, _NARROW, UNIT)


@triton.jit
def update_lines(rows, scalars, programs, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
                 BY_COLUMNS: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Update momentum and parameter of lines whose block's scale is known."""
    row, number, outer, first = _place(rows, programs)
    numbers, width = scalars + number * _SCALARS, tl.load(row + _WIDTH)
    if tl.int8 == M:
        _scaled(row, numbers, outer, first, width, P, G, M, ROUND, 1, TILE // 2, UNIT, BY_COLUMNS)
    elif UNIT == 0:
        _scaled(row, numbers, outer, first, width, P, G, M, ROUND, 64, 64, UNIT, BY_COLUMNS)
    elif not NARROW:
        _scaled(row, numbers, outer, first, width, P, G, M, ROUND, 1, TILE, UNIT, BY_COLUMNS)
    elif width == 1:
        _scaled(row, numbers, outer, first, width, P, G, M, ROUND, TILE // 2, 1, UNIT, BY_COLUMNS)
    else:
        _scaled(row, numbers, outer, first, width, P, G, M, ROUND, TILE // _NARROW, _NARROW, UNIT, BY_COLUMNS)


@triton.jit
def _fold(row, numbers, first, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """LINES blocks, whose number of sums is given by FOLD or STARTS."""
    block = first + tl.arange(0, LINES)
    live = block < tl.load(row + _BLOCKS)
    fold = tl.load(row + _FOLD)
    start, length = block * fold, tl.zeros_like(block) + fold
    if fold == 0:
        starts = tl.load(row + _STARTS).to(tl.pointer_type(tl.int32)) + block
        start = tl.load(starts, live, other=0).to(tl.int64)
        length = tl.load(starts + 1, live, other=0).to(tl.int64) - start
    sums = tl.load(row + _SUMS).to(tl.pointer_type(tl.float32)) + start[:, None]
    total = tl.zeros([LINES, WIDTH], tl.float32)
    for begin in range(0, tl.max(length, 0), WIDTH):
        at = (begin + tl.arange(0, WIDTH))[None, :]
        total += tl.load(sums + at, live[:, None] & (at < length[:, None]), other=0.0)
    scale = _moment(row, numbers, block, live, tl.sum(total, 1))
    tl.store(tl.load(row + _SCALE).to(tl.pointer_type(tl.float32)) + block, scale, live)


FOLDED = 1024
"""Sums that one program of `fold` adds at a time: of one block, or of as many blocks with one sum each."""
_FOLDED = tl.constexpr(FOLDED)


@triton.jit
def fold(rows, scalars, programs):
    """Blocks of many lines: add the lines' sums, advance the second moment, store the scale for the update."""
    row, number, _, first = _place(rows, programs)
    numbers = scalars + number * _SCALARS
    if tl.load(numbers + 8) != 0.0:
        if tl.load(row + _FOLD) == 1:
            _fold(row, numbers, first, _FOLDED, 1)
        else:
            _fold(row, numbers, first, 1, _FOLDED)
