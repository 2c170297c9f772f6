"""The fused engine for GPUs: all tensors of a call in a constant number of launches.

Every kernel works on tiles of [lines, columns]; a list of programs says which tile of which parameter is whose, and the
table of `kernels.table`, addresses included, is read on the device. Nothing waits for the host: numbers of steps, bias
corrections and missing gradients are dealt with where the data are. No fused multiply-add, so that an element's bits do
not depend on where it stands.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Work, int8, rounding, table
from .compiled import Compiled
from .table import Table, hyper_parameters
from .tensorwise import Tensorwise

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
_COLUMNS = tl.constexpr(table.COLUMNS)
_PARAM, _GRAD, _EXP_AVG = tl.constexpr(table.PARAM), tl.constexpr(table.GRAD), tl.constexpr(table.EXP_AVG)
_EXP_AVG_SCALE, _EXP_AVG_SQ = tl.constexpr(table.EXP_AVG_SCALE), tl.constexpr(table.EXP_AVG_SQ)
_STEP, _PRESENT, _GROUP = tl.constexpr(table.STEP), tl.constexpr(table.PRESENT), tl.constexpr(table.GROUP)
_OWN_SUMS, _SUMS, _SCALE = tl.constexpr(table.OWN_SUMS), tl.constexpr(table.SUMS), tl.constexpr(table.SCALE)
_BLOCK_OF_LINE, _STARTS = tl.constexpr(table.BLOCK_OF_LINE), tl.constexpr(table.STARTS)
_COUNTS, _COUNT = tl.constexpr(table.COUNTS), tl.constexpr(table.COUNT)
_DECAY, _SEED, _INNER, _WIDTH = (tl.constexpr(one) for one in (table.DECAY, table.SEED, table.INNER, table.WIDTH))
_FIRST, _REACH_INNER = tl.constexpr(table.FIRST), tl.constexpr(table.REACH_INNER)
_BLOCKS, _TILE, _FOLD = tl.constexpr(table.BLOCKS), tl.constexpr(table.TILE), tl.constexpr(table.FOLD)
_INDEX = tl.constexpr(table.INDEX)
_PARAM_OUTER, _GRAD_OUTER = tl.constexpr(table.PARAM_OUTER), tl.constexpr(table.GRAD_OUTER)
_EXP_AVG_OUTER = tl.constexpr(table.EXP_AVG_OUTER)
_LR, _BETA1, _BETA2, _EPS = (tl.constexpr(one) for one in (table.LR, table.BETA1, table.BETA2, table.EPS))
_WEIGHT_DECAY, _MAXIMIZE = tl.constexpr(table.WEIGHT_DECAY), tl.constexpr(table.MAXIMIZE)
_LOG_BETA1, _LOG_BETA2 = tl.constexpr(table.LOG_BETA1), tl.constexpr(table.LOG_BETA2)
_RUN = tl.constexpr(int8.RUN)
_GOLDEN, _MIX1, _MIX2 = (tl.constexpr(one) for one in (rounding.GOLDEN, rounding.FIRST, rounding.SECOND))
SCALARS = 10
_SCALARS = tl.constexpr(SCALARS)


@triton.jit
def _prepare(rows, hyper, scalars, number, BLOCK: tl.constexpr):
    """Per parameter: advance `step` where any rank has a gradient; what the other kernels multiply with, float32.

    Columns of `scalars`: lr / (1 - beta1^t), 1 - beta2^t, decay, beta1, +-(1 - beta1), beta2, 1 - beta2, eps, has
    anybody a gradient, t.
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
def _mix(x):
    """See `rounding.mix`; uint32."""
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return x ^ (x >> 16)


@triton.jit
def _rounded(value, TYPE: tl.constexpr, index, seed, step, ROUND: tl.constexpr):
    """`value` as TYPE; bfloat16 to nearest even, or at random as in `rounding.stochastic`."""
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
def _tile(row, column: tl.constexpr, TYPE: tl.constexpr, outer, line, columns, UNIT: tl.constexpr):
    """Pointers [lines, columns] into param, gradient or momentum; UNIT: the dim of stride 1, 2 for none."""
    base = tl.load(row + column[0]).to(tl.pointer_type(TYPE)) + outer * tl.load(row + column[1])
    if UNIT == 0:
        return base + line[:, None] + columns[None, :] * tl.load(row + column[1] + 2)
    elif UNIT == 1:
        return base + line[:, None] * tl.load(row + column[1] + 1) + columns[None, :]
    else:
        return base + line[:, None] * tl.load(row + column[1] + 1) + columns[None, :] * tl.load(row + column[1] + 2)


@triton.jit
def _sums(row, outer, line, live, width, G: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Sums of squares of the gradient's lines, float32 [LINES]; the order depends on `width` alone."""
    columns = tl.arange(0, WIDTH).to(tl.int64)
    total = tl.zeros([LINES, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        at = start + columns
        mask = live[:, None] & (at < width)[None, :]
        g = tl.load(_tile(row, (_GRAD, _GRAD_OUTER), G, outer, line, at, UNIT), mask, other=0.0).to(tl.float32)
        total += g * g
    return tl.sum(total, 1)


@triton.jit
def _update(row, numbers, outer, line, live, width, scale, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
            ROUND: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Momentum and parameter of whole lines; `scale` is float32 [LINES]."""
    decay, momentum, weight = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    columns = tl.arange(0, WIDTH).to(tl.int64)
    for start in range(0, width, WIDTH):
        at = start + columns
        mask = live[:, None] & (at < width)[None, :]
        g = tl.load(_tile(row, (_GRAD, _GRAD_OUTER), G, outer, line, at, UNIT), mask, other=0.0).to(tl.float32)
        where_m = _tile(row, (_EXP_AVG, _EXP_AVG_OUTER), M, outer, line, at, UNIT)
        m = tl.load(where_m, mask, other=0.0).to(tl.float32)
        if tl.int8 == M:
            runs = (outer * tl.load(row + _INNER) + line) * (width // _RUN)
            scales = tl.load(row + _EXP_AVG_SCALE).to(tl.pointer_type(tl.float32)) + runs[:, None]
            m = m * tl.load(scales + (at // _RUN)[None, :], mask, other=0.0)
        m = m * momentum + g * weight
        where_p = _tile(row, (_PARAM, _PARAM_OUTER), P, outer, line, at, UNIT)
        p = tl.load(where_p, mask, other=0.0).to(tl.float32)
        p = p * decay - m * scale[:, None]
        if ROUND:
            first, step = tl.load(row + _INDEX), tl.load(numbers + 9)
            lines = first + outer * tl.load(row + _INDEX + 1) + line * tl.load(row + _INDEX + 2)
            index = lines[:, None] + at[None, :] * tl.load(row + _INDEX + 3)
            tl.store(where_p, _rounded(p, P, index, tl.load(row + _SEED), step, True), mask)
        else:
            tl.store(where_p, _rounded(p, P, 0, 0, 0, False), mask)
        if tl.int8 == M:
            # As `int8.quantize`: q = m * (127 / absmax), rounded half to even by adding 1.5 * 2^23.
            RUNS: tl.constexpr = WIDTH // _RUN
            parts = tl.reshape(m, [LINES, RUNS, _RUN])
            wrong = tl.max((parts != parts).to(tl.int32), 2) != 0
            absmax = tl.where(wrong, float("nan"), tl.max(tl.abs(parts), 2))
            inverse = tl.where(absmax > 0, tl.div_rn(tl.full([LINES, RUNS], 127.0, tl.float32), absmax), 0.0)
            q = parts * inverse[:, :, None]
            q = tl.where(q == q, q, 0.0)
            q = (tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0) - 12582912.0
            tl.store(where_m, tl.reshape(q, [LINES, WIDTH]).to(tl.int8), mask)
            run = start // _RUN + tl.arange(0, RUNS)
            known = live[:, None] & (run < width // _RUN)[None, :]
            tl.store(scales + run[None, :], tl.div_rn(absmax, tl.full([LINES, RUNS], 127.0, tl.float32)), known)
        else:
            tl.store(where_m, _rounded(m, M, 0, 0, 0, False), mask)


@triton.jit
def _moment(row, numbers, block, live, total):
    """Advance the second moments of blocks with sums `total`; the scale of their momentum, float32 [blocks]."""
    count = tl.load(row + _COUNT)
    if count == 0:
        counts = tl.load(row + _COUNTS).to(tl.pointer_type(tl.int64)) + block
        mean = tl.div_rn(total, tl.load(counts, live, other=1).to(tl.float32))
    else:
        mean = tl.div_rn(total, tl.zeros_like(total) + count.to(tl.float32))
    moments = tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + block
    v = tl.load(moments, live, other=0.0) * tl.load(numbers + 5) + mean * tl.load(numbers + 6)
    tl.store(moments, v, live)
    root = tl.sqrt_rn(tl.div_rn(v, tl.zeros_like(v) + tl.load(numbers + 1)))
    return tl.div_rn(tl.zeros_like(v) + tl.load(numbers), root + tl.load(numbers + 7))


@triton.jit
def _one_line_blocks(rows, scalars, programs, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
                     LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Blocks of one line that this rank alone holds: everything at once, the gradient's second read from the cache."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    number, outer = tl.load(program).to(tl.int64), tl.load(program + 1).to(tl.int64)
    row, numbers = rows + number * _COLUMNS, scalars + number * _SCALARS
    line = tl.load(program + 2).to(tl.int64) + tl.arange(0, LINES)
    live = line < tl.load(row + _INNER)
    width = tl.load(row + _WIDTH)
    total = _sums(row, outer, line, live, width, G, LINES, WIDTH, UNIT)
    block = tl.load(row + _FIRST) + outer * tl.load(row + _REACH_INNER) + line
    scale = _moment(row, numbers, block, live, total)
    _update(row, numbers, outer, line, live, width, scale, P, G, M, ROUND, LINES, WIDTH, UNIT)


@triton.jit
def _line_sums(rows, programs, G: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """One sum of squares per line, where the exchange or the fold finds it."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    row, outer = rows + tl.load(program).to(tl.int64) * _COLUMNS, tl.load(program + 1).to(tl.int64)
    line = tl.load(program + 2).to(tl.int64) + tl.arange(0, LINES)
    live = line < tl.load(row + _INNER)
    total = _sums(row, outer, line, live, tl.load(row + _WIDTH), G, LINES, WIDTH, UNIT)
    sums = tl.load(row + _OWN_SUMS).to(tl.pointer_type(tl.float32))
    tl.store(sums + tl.load(row + _FIRST) + outer * tl.load(row + _REACH_INNER) + line, total, live)


@triton.jit
def _fold(rows, scalars, programs, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Blocks of many lines: add the lines' sums, advance the second moment, leave the scale for the update."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(program).to(tl.int64)
    row, numbers = rows + number * _COLUMNS, scalars + number * _SCALARS
    if tl.load(numbers + 8) != 0.0:
        block = tl.load(program + 2).to(tl.int64) + tl.arange(0, LINES)
        live = block < tl.load(row + _BLOCKS)
        fold = tl.load(row + _FOLD)
        first, length = block * fold, tl.zeros_like(block) + fold
        if fold == 0:
            starts = tl.load(row + _STARTS).to(tl.pointer_type(tl.int32)) + block
            first = tl.load(starts, live, other=0).to(tl.int64)
            length = tl.load(starts + 1, live, other=0).to(tl.int64) - first
        longest = tl.max(length, 0)
        sums = tl.load(row + _SUMS).to(tl.pointer_type(tl.float32)) + first[:, None]
        total = tl.zeros([LINES, WIDTH], tl.float32)
        for start in range(0, longest, WIDTH):
            at = (start + tl.arange(0, WIDTH))[None, :]
            total += tl.load(sums + at, live[:, None] & (at < length[:, None]), other=0.0)
        scale = _moment(row, numbers, block, live, tl.sum(total, 1))
        tl.store(tl.load(row + _SCALE).to(tl.pointer_type(tl.float32)) + block, scale, live)


@triton.jit
def _update_lines(rows, scalars, programs, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
                  LINES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Momentum and parameter of lines whose block's scale is known."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    number, outer = tl.load(program).to(tl.int64), tl.load(program + 1).to(tl.int64)
    row, numbers = rows + number * _COLUMNS, scalars + number * _SCALARS
    line = tl.load(program + 2).to(tl.int64) + tl.arange(0, LINES)
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
    _update(row, numbers, outer, line, live, tl.load(row + _WIDTH), scale, P, G, M, ROUND, LINES, WIDTH, UNIT)


WIDE = 4096
"""Elements of a tile."""
SHAPES = ((1, 1024), (256, 16), (1024, 4), (None, 1))
"""(widest line, lines of a tile) of lines whose elements are neighbours; wider ones take several tiles one by one."""
COLUMNS_SHAPE = (64, 64)
"""The tile of transposed tensors, whose lines are neighbours and not their elements."""


def _shape(width: int, unit: int) -> tuple[int, int]:
    """The tile, lines and columns, for lines of `width` elements: a function of the width alone, as the bits are."""
    if unit == 0 and width > 1:
        return COLUMNS_SHAPE
    lines = next(lines for widest, lines in SHAPES if widest is None or width <= widest)
    return lines, (1 if width == 1 else max(WIDE // lines, 1))


WARPS = 8
STRIDES = slice(table.PARAM_OUTER, table.COLUMNS)


class _Device:
    """A table's copy on the device, and the lists of programs: who does which tile."""

    def __init__(self, own: Table) -> None:
        device = own.scratch.device
        self.table = own
        self.number = len(own.rows)
        self.values = np.empty(0, dtype=np.int64)
        self.strides = own.rows[:, STRIDES].copy()
        self.rows = torch.empty(own.rows.shape, dtype=torch.int64, device=device)
        self.hyper_values = np.empty((0, 8))
        self.hyper = torch.empty((0, 8), dtype=torch.float64, device=device)
        self.scalars = torch.empty((self.number, SCALARS), dtype=torch.float32, device=device)
        self.lists: dict[str, dict[tuple[int, int, int], Tensor]] = {}
        units = [_unit(row) for row in own.rows]
        for name, members in (
            ("one_line", [number for number, alone in enumerate(own.one_line) if alone]),
            ("many", [number for number, alone in enumerate(own.one_line) if not alone]),
        ):
            found: dict[tuple[int, int, int], list[np.ndarray]] = {}
            for number in members:
                outer, inner, width = own.lines[number].sizes
                lines, wide = _shape(width, units[number])
                starts = np.arange(0, inner, lines, dtype=np.int32)
                triples = np.empty((outer, len(starts), 3), dtype=np.int32)
                triples[:, :, 0], triples[:, :, 1], triples[:, :, 2] = number, np.arange(outer)[:, None], starts
                found.setdefault((lines, wide, units[number]), []).append(triples.reshape(-1, 3))
            self.lists[name] = {shape: _upload(parts, device) for shape, parts in found.items()}
        folds: dict[tuple[int, int, int], list[np.ndarray]] = {}
        for number, alone in enumerate(own.one_line):
            if not alone:
                shape = (1024, 1, 0) if own.lines[number].fold == 1 else (1, 1024, 0)
                starts = np.arange(0, own.lines[number].blocks, shape[0], dtype=np.int32)
                triples = np.zeros((len(starts), 3), dtype=np.int32)
                triples[:, 0], triples[:, 2] = number, starts
                folds.setdefault(shape, []).append(triples)
        self.lists["fold"] = {shape: _upload(parts, device) for shape, parts in folds.items()}


def _unit(row: np.ndarray) -> int:
    """The dim, lines 0 or columns 1, whose stride is 1 in param, gradient and momentum alike; 2 for none."""
    inner = [row[start + 1] for start in (table.PARAM_OUTER, table.GRAD_OUTER, table.EXP_AVG_OUTER)]
    width = [row[start + 2] for start in (table.PARAM_OUTER, table.GRAD_OUTER, table.EXP_AVG_OUTER)]
    if row[table.WIDTH] == 1 or all(one == 1 for one in width):
        return 1
    return 0 if all(one == 1 for one in inner) else 2


def _upload(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


class TritonEngine(Compiled):
    """See the file's docstring; `launches` counts what was launched."""

    device_type = "cuda"
    step_on_device = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, plain: Tensorwise, capturable: bool = False) -> None:
        super().__init__(plain)
        self.capturable = capturable
        self.launches = 0

    def forget(self) -> None:
        """See `Engine.forget`."""
        super().forget()
        self._devices: dict[int, _Device] = {}
        self._kept: list[Tensor] = []

    def run_sums(self, table: Table, works: Sequence[Work]) -> None:
        """See `Compiled.run_sums`."""
        here = self._here(table)
        for name in ("one_line", "many"):
            self._line_sums(here, name, works)

    def run_update(self, table: Table, works: Sequence[Work]) -> None:
        """See `Compiled.run_update`."""
        here, first = self._here(table), works[0]
        self._load_hyper(here, works)
        self.launches += 1
        with _device(here.rows.device):
            _prepare[(triton.cdiv(here.number, 128),)](here.rows, here.hyper, here.scalars, here.number, BLOCK=128)
        if first.grad is None:
            self._launch(_fold, here, "fold", here.scalars)
            return
        types = {"P": _TYPES[first.param.dtype], "G": _TYPES[first.grad.dtype], "M": _TYPES[first.exp_avg.dtype]}
        types["ROUND"] = first.seed is not None and first.param.dtype == torch.bfloat16
        self._launch(_one_line_blocks, here, "one_line", here.scalars, **types)
        if first.sums is None:
            self._line_sums(here, "many", works)
        self._launch(_fold, here, "fold", here.scalars)
        self._launch(_update_lines, here, "many", here.scalars, **types)

    def _line_sums(self, here: _Device, name: str, works: Sequence[Work]) -> None:
        assert works[0].grad is not None
        self._launch(_line_sums, here, name, G=_TYPES[works[0].grad.dtype])

    def _launch(self, kernel: Any, here: _Device, name: str, *args: Tensor, **constants: Any) -> None:
        """One launch per shape of tile that there is."""
        with _device(here.rows.device):
            for (lines, width, unit), programs in here.lists[name].items():
                self.launches += 1
                shape = {"LINES": lines, "WIDTH": width, **({} if name == "fold" else {"UNIT": unit})}
                kernel[(len(programs),)](
                    here.rows, *args, programs, **constants, **shape, num_warps=WARPS, enable_fp_fusion=False
                )

    def _here(self, table: Table) -> _Device:
        """The table's copy on the device, brought up to date if an address has changed."""
        here = self._devices.get(id(table))
        if here is None or here.table is not table or not np.array_equal(here.strides, table.rows[:, STRIDES]):
            here = self._devices[id(table)] = _Device(table)
        if not np.array_equal(here.values, table.rows):
            here.values = table.rows.copy()
            self._copy(here.values, here.rows)
        return here

    def _load_hyper(self, here: _Device, works: Sequence[Work]) -> None:
        """Bring the hyper-parameters to the device if they have changed; a learning rate that is there stays there."""
        values = hyper_parameters(works)
        if not np.array_equal(values, here.hyper_values):
            if values.shape != here.hyper_values.shape:
                here.hyper = torch.empty(values.shape, dtype=torch.float64, device=here.rows.device)
            here.hyper_values = values
            self._copy(values, here.hyper)
        for number, group in enumerate({id(work.group): work.group for work in works}.values()):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                here.hyper[number, table.LR].copy_(lr)

    def _copy(self, values: np.ndarray, target: Tensor) -> None:
        """Copy to the device without waiting for it: from pinned memory, which torch keeps until the copy is done."""
        source = torch.from_numpy(values.copy())
        if target.device.type == "cuda":
            source = source.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._kept.append(source)  # a graph reads it again in every replay
        target.copy_(source, non_blocking=True)


def _device(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
