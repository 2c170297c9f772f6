"""The kernels of second moments by columns, alone or factored; see `columns.py`.

`triton_kernels.py` explains programs; `triton.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns, table
from .triton_kernels import (
    _BETA2,
    _COLUMN,
    _COUNT,
    _EXP_AVG_SQ,
    _GROUP,
    _INNER,
    _LOG_BETA2,
    _SCALARS,
    _SCALE,
    _STEP,
    _SUMS,
    _WIDTH,
    _gradient,
    _moved,
    _place,
)

_COLUMN_SUMS, _COLUMN_SQ = tl.constexpr(table.COLUMN_SUMS), tl.constexpr(table.COLUMN_SQ)
_COLUMN_TOTALS, _COLUMN_COUNT = tl.constexpr(table.COLUMN_TOTALS), tl.constexpr(table.COLUMN_COUNT)
_WHOLE_SQ, _WHOLE_TOTALS = tl.constexpr(table.WHOLE_SQ), tl.constexpr(table.WHOLE_TOTALS)
_WHOLE_COUNT, _WHOLE_FOLD = tl.constexpr(table.WHOLE_COUNT), tl.constexpr(table.WHOLE_FOLD)
_BITS, _LEAST_BETA2 = tl.constexpr(columns.BITS), tl.constexpr(columns.LEAST_BETA2)

STRIP = 64
"""Columns per program of `column_sums`, which goes over all lines with the same outer index, _TALL at a time."""
_STRIP, _TALL = tl.constexpr(STRIP), tl.constexpr(32)


@triton.jit
def _rounding_offset(row, hyper, place, live):
    """The offset that rounds squares of columns to their quanta, float64: see `columns.rounding_offset`."""
    group = hyper + tl.load(row + _GROUP) * 8
    step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    correction = 1.0 - tl.exp(step * tl.load(group + _LOG_BETA2))
    moments = tl.load(tl.load(row + _COLUMN_SQ).to(tl.pointer_type(tl.float32)) + place, live, other=0.0)
    expected = moments.to(tl.float64) * (tl.load(row + _COLUMN_COUNT).to(tl.float64) / correction)
    exponent = (expected.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    zero = tl.zeros_like(expected)
    remembered = (zero + step >= 1.0) & (zero + tl.load(group + _BETA2) >= _LEAST_BETA2)
    known = remembered & (expected > 0.0) & (exponent < 2047)
    # 1.5 * 2**(52 - BITS) times the power of two above what is expected.
    bits = ((exponent + (53 - _BITS)) << 52) | (1 << 51)
    return tl.where(known, bits, 0).to(tl.float64, bitcast=True)


@triton.jit
def column_sums(rows, hyper, programs, G: tl.constexpr, UNIT: tl.constexpr):
    """Sums of squares of columns, float64, each square rounded with `columns.rounding_offset`; the first line of a
    program is a column here."""
    row, _, outer, first = _place(rows, programs)
    inner, width = tl.load(row + _INNER), tl.load(row + _WIDTH)
    at = first + tl.arange(0, _STRIP)
    live, place = at < width, outer * width + at
    offset = _rounding_offset(row, hyper, place, live)
    total = tl.zeros([_STRIP], tl.float64)
    for start in range(0, inner, _TALL):
        line = start + tl.arange(0, _TALL).to(tl.int64)
        g = _gradient(row, outer, line, line < inner, at, width, G, UNIT).to(tl.float64)
        total += tl.sum((g * g + offset[None, :]) - offset[None, :], 0)
    tl.store(tl.load(row + _COLUMN_SUMS).to(tl.pointer_type(tl.float64)) + place, total, live)


MANY = 1024
"""Rows or columns per program of the three kernels of moments by columns."""
_MANY = tl.constexpr(MANY)


@triton.jit
def column_moments(rows, scalars, programs):
    """Advance second moments of columns, and store their roots."""
    row, number, outer, first = _place(rows, programs)
    numbers = scalars + number * _SCALARS
    at, width = first + tl.arange(0, _MANY), tl.load(row + _WIDTH)
    live, place = at < width, outer * width + at
    if tl.load(numbers + 8) != 0.0:
        totals = tl.load(row + _COLUMN_TOTALS).to(tl.pointer_type(tl.float64)) + place
        mean = (tl.load(totals, live, other=0.0) / tl.load(row + _COLUMN_COUNT).to(tl.float64)).to(tl.float32)
        v = _moved(tl.load(row + _COLUMN_SQ).to(tl.pointer_type(tl.float32)) + place, live, mean, numbers)
        root = tl.sqrt_rn(tl.div_rn(v, tl.zeros_like(v) + tl.load(numbers + 1)))
        tl.store(tl.load(row + _COLUMN).to(tl.pointer_type(tl.float32)) + place, root, live)


@triton.jit
def whole_moments(rows, scalars, programs):
    """Advance the second moment of a full matrix, from sums of its rows."""
    row, number, outer, _ = _place(rows, programs)
    numbers = scalars + number * _SCALARS
    if tl.load(numbers + 8) != 0.0:
        fold = tl.load(row + _WHOLE_FOLD)
        sums = tl.load(row + _WHOLE_TOTALS).to(tl.pointer_type(tl.float32)) + outer * fold
        total = tl.zeros([_MANY], tl.float32)
        for begin in range(0, fold, _MANY):
            at = begin + tl.arange(0, _MANY)
            total += tl.load(sums + at, at < fold, other=0.0)
        one = tl.zeros([1], tl.float32) + tl.sum(total, 0)
        mean = tl.div_rn(one, tl.zeros_like(one) + tl.load(row + _WHOLE_COUNT).to(tl.float32))
        moments = tl.load(row + _WHOLE_SQ).to(tl.pointer_type(tl.float32)) + outer + tl.arange(0, 1)
        _moved(moments, tl.arange(0, 1) == 0, mean, numbers)


@triton.jit
def row_moments(rows, scalars, programs):
    """Advance second moments of rows, and store the roots of their ratios to the matrix mean; see `columns.roots`."""
    row, number, outer, first = _place(rows, programs)
    numbers = scalars + number * _SCALARS
    at, inner = first + tl.arange(0, _MANY), tl.load(row + _INNER)
    live, place = at < inner, outer * inner + at
    if tl.load(numbers + 8) != 0.0:
        total = tl.load(tl.load(row + _SUMS).to(tl.pointer_type(tl.float32)) + place, live, other=0.0)
        mean = tl.div_rn(total, tl.zeros_like(total) + tl.load(row + _COUNT).to(tl.float32))
        v = _moved(tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + place, live, mean, numbers)
        whole = tl.zeros_like(v) + tl.load(tl.load(row + _WHOLE_SQ).to(tl.pointer_type(tl.float32)) + outer)
        share = tl.where(whole == 0.0, 0.0, tl.div_rn(v, whole))
        share = tl.where(whole - whole == 0.0, share, float("nan"))
        tl.store(tl.load(row + _SCALE).to(tl.pointer_type(tl.float32)) + place, tl.sqrt_rn(share), live)
