"""Copies between tensors and the buffers of the compiled loops: any dtype, any strides, int8 momentum.

A tile is `lines` lines of `size` elements; `line` is the stride of the lines, `step` that of the elements of a line. In
a buffer a tile is contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import int8
from .machine import compiled, from_bits, inlined, nearest, never_inline, pointer, to_bits, wide

FLOAT32, FLOAT64, BFLOAT16, INT8 = range(4)
"""How a tensor's elements are stored."""
RUN, TINY = int8.RUN, int8.TINY

PIECE = 1024
"""Elements of a line that are summed together; see `loops`."""
SIDE = 16
"""Lines processed together if adjacent elements in memory belong to different lines: a cache line of float32."""
BUFFER_SIZE, UPDATE_TILE = SIDE * PIECE, SIDE * 256
"""Elements of a buffer, and of a tile that is updated, so that three buffers fit into the cache."""

PARAMS, GRADS, AVERAGES, SCALES, ELEMENT_SCALES, TOTALS, ITEM = range(7)
"""Entries of a thread's `buffers`: addresses of six buffers of BUFFER_SIZE elements, and the bytes per element."""
BUFFERS = 6


@inlined
def _read(buffer: Any, source: Any, lines: int, size: int, line: int, step: int) -> None:
    if step == 1:
        for i in range(lines):
            for at in range(size):
                buffer[i * size + at] = wide(source[i * line + at])
    elif size == 1 and line == 1:
        for i in range(lines):
            buffer[i] = wide(source[i])
    else:
        for at in range(size):
            for i in range(lines):
                buffer[i * size + at] = wide(source[i * line + at * step])


@compiled
def load(buffer: Any, address: int, start: int, kind: int, lines: int, size: int, line: int, step: int) -> None:
    """Fill a buffer from the tensor at `address`, starting at its element `start`."""
    never_inline()
    if kind == FLOAT32:
        _read(buffer, pointer(address + 4 * start, np.float32), lines, size, line, step)
    elif kind == FLOAT64:
        _read(buffer, pointer(address + 8 * start, np.float64), lines, size, line, step)
    elif kind == BFLOAT16:
        _read(buffer, pointer(address + 2 * start, np.uint16), lines, size, line, step)
    else:
        _read(buffer, pointer(address + start, np.int8), lines, size, line, step)


@inlined
def _write(buffer: Any, target: Any, lines: int, size: int, line: int, step: int) -> None:
    if step == 1 or (size == 1 and line == 1):
        for i in range(lines):
            for at in range(size):
                target[i * line + at] = buffer[i * size + at]
    else:
        for at in range(size):
            for i in range(lines):
                target[i * line + at * step] = buffer[i * size + at]


@compiled
def store(buffer: Any, address: int, start: int, kind: int, lines: int, size: int, line: int, step: int) -> None:
    """The inverse of `load`; bfloat16 rounds to nearest."""
    never_inline()
    if kind == FLOAT32:
        _write(buffer, pointer(address + 4 * start, np.float32), lines, size, line, step)
    elif kind == FLOAT64:
        _write(buffer, pointer(address + 8 * start, np.float64), lines, size, line, step)
    elif kind == BFLOAT16:
        target = pointer(address + 2 * start, np.uint16)
        for i in range(lines):
            for at in range(size):
                target[i * line + at * step] = nearest(buffer[i * size + at])
    else:
        _write(buffer, pointer(address + start, np.int8), lines, size, line, step)


@compiled
def dequantize(buffer: Any, scales: Any, number: int) -> None:
    """Multiply every run of int8 values in a buffer by its scale."""
    never_inline()
    for run in range(number // RUN):
        scale = scales[run]
        for at in range(run * RUN, run * RUN + RUN):
            buffer[at] = np.float32(np.float32(buffer[at]) * scale)


@compiled
def quantize(buffer: Any, scales: Any, number: int) -> None:
    """See `int8.quantize`; the values stay in the buffer."""
    never_inline()
    tiny = np.float32(TINY)
    limit, far = np.float32(127), np.float32(12582912)  # 3 * 2^22: adding it drops the fraction
    for run in range(number // RUN):
        largest = np.uint32(0)
        for at in range(run * RUN, run * RUN + RUN):
            # Bit patterns of absolute values have the same order, with NaN above infinity.
            largest = max(largest, np.uint32(to_bits(np.float32(buffer[at])) & np.uint32(0x7FFFFFFF)))
        absmax = from_bits(largest)
        scales[run] = np.float32(0) if absmax < tiny else np.float32(absmax / limit)
        inverse = np.float32(limit / absmax) if absmax >= tiny else np.float32(0)
        for at in range(run * RUN, run * RUN + RUN):
            value = np.float32(np.float32(buffer[at]) * inverse)
            buffer[at] = np.float32(np.float32(value + far) - far) if value == value else np.float32(0)
