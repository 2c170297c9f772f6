"""The fused engine for CPUs: compiled loops over all tensors of a call, distributed over a few threads.

A call is a list of *units* of about UNIT elements (some lines or blocks of one parameter), processed in at most three
phases: sums of lines, moments of blocks, updates. Blocks that are complete on this rank and fit into the cache take one
pass. The units, and the order inside them, do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import llvmlite
import numba
import numpy as np
import torch
from torch import Tensor

from . import ParamStep, Spec, columns, log, loops, tiles
from .compiled import Compiled
from .lines import Lines
from .table import COLUMNS, PARTIALS, ROUNDING_OFFSET, Table, hyper_parameters
from .tensorwise import Tensorwise

UNIT = 1 << 16
"""Elements of a unit: enough to hide the cost of fetching one, few enough to balance the threads."""
LARGEST = 1 << 17
"""Largest block, in elements, whose sums and update take one pass, while its gradient is in the cache."""
ALONE = 1 << 16
"""Number of elements up to which the calling thread does all work."""

KINDS = {
    torch.float32: tiles.FLOAT32,
    torch.float64: tiles.FLOAT64,
    torch.bfloat16: tiles.BFLOAT16,
    torch.int8: tiles.INT8,
}
LIKE: dict[torch.dtype, np.ndarray] = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
NO_NUMBERS = np.zeros((1, loops.NUMBERS))

Phase = tuple[np.ndarray, int]
"""Units, and their total number of elements."""

MOST_THREADS = 128

_pools: dict[int, ThreadPoolExecutor] = {}
"""This process's thread pool, by process id."""
_own = threading.local()
"""The buffers of each thread, by dtype."""
_failed: dict[torch.dtype, str | None] = {}
"""By dtype: None if it was compiled, or why it could not be."""


class CpuEngine(Compiled):
    """See `kernels.Engine`."""

    version = f"fused, torch {torch.__version__}, numba {numba.__version__}, llvmlite {llvmlite.__version__}"
    device_type = "cpu"
    precisions = (torch.float32, torch.float64)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)

    def __init__(self, plain: Tensorwise) -> None:
        super().__init__(plain)
        self._phases: WeakKeyDictionary[Table, list[Phase]] = WeakKeyDictionary()
        self._strips: WeakKeyDictionary[Table, list[Phase]] = WeakKeyDictionary()

    def run_sums(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_sums`."""
        if table not in self._phases:
            parts = [_lines(row, loops.SUM, lines) for row, lines in enumerate(table.lines)]
            self._phases[table] = _joined([parts])
        for phase in self._phases[table]:
            _spread(table, phase, np.broadcast_to(NO_NUMBERS, (len(param_steps), loops.NUMBERS)).copy(), param_steps[0])

    def run_squares(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_squares`."""
        pieces = [-(-param_lines.sizes[2] // tiles.PIECE) for param_lines in table.lines]
        numbers = [
            param_lines.number * each if table.factored else 0
            for param_lines, each in zip(table.lines, pieces, strict=True)
        ]
        partials = [torch.empty(number, dtype=torch.float64) for number in numbers]
        offset = [
            None if (param_lines := columns.rounding_offset(param_step)) is None else param_lines.contiguous()
            for param_step in param_steps
        ]
        table.place(PARTIALS, partials)
        table.place(ROUNDING_OFFSET, offset)
        if table not in self._strips:
            strips, lines = [], []
            for row, (param_lines, each) in enumerate(zip(table.lines, pieces, strict=True)):
                outer, inner, width = param_lines.sizes
                strips.append(_units(row, loops.STRIP, outer * each if inner else 0, inner * min(width, tiles.PIECE)))
                lines.append(_units(row, loops.JOIN, param_lines.number, each))
            self._strips[table] = _joined([strips, lines] if table.factored else [strips])
        for phase in self._strips[table]:
            _spread(table, phase, np.broadcast_to(NO_NUMBERS, (len(param_steps), loops.NUMBERS)).copy(), param_steps[0])

    def run_update(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_update`."""
        if table not in self._phases:
            self._phases[table] = _phases(table, param_steps)
        numbers = np.empty((len(param_steps), loops.NUMBERS))
        active = np.asarray(
            [param_step.grad is not None or _elsewhere(param_step.present) for param_step in param_steps]
        )
        loops.prepare(table.rows, hyper_parameters(param_steps), active, numbers)
        for phase in self._phases[table]:
            _spread(table, phase, numbers, param_steps[0])

    def fallback(self, spec: Spec) -> str | None:
        """See `Engine.fallback`."""
        return super().fallback(spec) or _compiled(spec.exp_avg_sq)


def _elsewhere(present: Tensor | None) -> bool:
    """Whether another rank has a gradient."""
    return present is not None and present.item() > 0


def _compiled(dtype: torch.dtype) -> str | None:
    """Compile the loops for one dtype of arithmetic; the reason if that fails, else None."""
    if dtype not in _failed:
        rows, counter = np.zeros((0, COLUMNS), np.int64), np.zeros(1, np.int64)
        units, kinds = np.zeros((0, 4), np.int64), np.zeros(3, np.int64)
        numbers = np.zeros((0, loops.NUMBERS))
        started = time.perf_counter()
        try:
            loops.prepare(rows, np.zeros((0, 8)), np.zeros(0, np.bool_), numbers)
            _run_units(dtype, rows, units, counter.ctypes.data, numbers, kinds, KINDS[dtype])
            _failed[dtype] = None
            if (seconds := time.perf_counter() - started) > 1:
                log.info(f"AdamMini: compiled its CPU loops for {dtype} in {seconds:.0f} s; numba caches them")
        except Exception as error:  # numba fails in many ways: fall back to torch operations
            _failed[dtype] = f"numba cannot compile its loops ({type(error).__name__}: {str(error).strip()[:300]})"
    return _failed[dtype]


# Units


def _lines(row: int, kind: int, lines: Lines) -> Phase:
    return _units(row, kind, lines.number, lines.sizes[2])


def _units(row: int, kind: int, number: int, elements: int) -> Phase:
    """Units of `number` lines or blocks of `elements` elements each."""
    each = max(1, UNIT // max(1, elements))
    starts = np.arange(0, number, each, dtype=np.int64)
    units = np.empty((len(starts), 4), np.int64)
    units[:, loops.ROW], units[:, loops.KIND], units[:, loops.START] = row, kind, starts
    units[:, loops.NUMBER] = np.minimum(each, number - starts)
    return units, number * elements


def _phases(table: Table, param_steps: Sequence[ParamStep]) -> list[Phase]:
    """The phases of an update."""
    sums, folds, updates = [], [], []
    for row, (param_step, lines) in enumerate(zip(param_steps, table.lines, strict=True)):
        if table.by_columns:
            updates.append(_lines(row, loops.UPDATE, lines))
            continue
        largest = int(lines.counts.max()) if lines.counts.size else 0
        if param_step.grad is not None and (table.one_line[row] or (param_step.sums is None and largest <= LARGEST)):
            updates.append(_units(row, loops.ONE_PASS, lines.blocks, largest))
            continue
        without = param_step.grad is None and param_step.sums is None
        per_block = max(1, lines.number // max(1, lines.blocks))
        folds.append(_units(row, loops.ZERO if without else loops.FOLDED, lines.blocks, per_block))
        if param_step.grad is not None:
            updates.append(_lines(row, loops.UPDATE, lines))
            if param_step.sums is None:
                sums.append(_lines(row, loops.SUM, lines))
    return _joined([sums, folds, updates])


def _joined(phases: Sequence[Sequence[Phase]]) -> list[Phase]:
    """One list of units per phase; empty phases are left out."""
    joined = [(np.concatenate([units for units, _ in parts]), sum(n for _, n in parts)) for parts in phases if parts]
    return [phase for phase in joined if len(phase[0])]


# Threads


def _spread(table: Table, phase: Phase, numbers: np.ndarray, param_step: ParamStep) -> None:
    """Run one phase with as many threads as torch would use, including the calling thread."""
    units, elements = phase
    kinds = np.asarray(
        [
            KINDS[tensor.dtype] if tensor is not None else 0
            for tensor in (param_step.param, param_step.grad, param_step.exp_avg)
        ]
    )
    dtype = param_step.exp_avg_sq.dtype
    counter = np.zeros(1, np.int64)
    arguments = (table.rows, units, counter.ctypes.data, numbers, kinds, KINDS[dtype])
    threads = min(torch.get_num_threads(), len(units), MOST_THREADS) if elements > ALONE else 1
    try:
        helpers = [_pool().submit(_run_units, dtype, *arguments) for _ in range(threads - 1)]
        _run_units(dtype, *arguments)
        for helper in helpers:
            helper.result()
    except BaseException:
        _end_helpers()
        raise


def _run_units(dtype: torch.dtype, *arguments: Any) -> None:
    """The loop of every thread."""
    buffers = _own.__dict__.get(dtype)
    if buffers is None:
        like = LIKE[dtype]
        # Some cache lines apart, to avoid aliasing of addresses with equal low bits.
        memory = np.empty(tiles.BUFFERS * (tiles.BUFFER_SIZE + 72), np.float64)
        places = [memory.ctypes.data + place * 8 * (tiles.BUFFER_SIZE + 72) for place in range(tiles.BUFFERS)]
        buffers = _own.__dict__[dtype] = (np.asarray([*places, like.itemsize]), like, memory)
    loops.run(*arguments, *buffers[:2])


def _pool() -> ThreadPoolExecutor:
    """The thread pool of this process; a forked child gets a new one. Threads start when needed."""
    pool = _pools.get(os.getpid())
    if pool is None:
        _pools.clear()
        pool = _pools[os.getpid()] = ThreadPoolExecutor(MOST_THREADS, "AdamMini")
    return pool


def _end_helpers() -> None:
    """Wait until no helper is running: its tensors may be freed once an exception propagates.

    An interrupted call may not know its helpers, so this waits for all threads of the pool; later calls start new ones.
    """
    pool = _pools.pop(os.getpid(), None)
    while pool is not None:
        try:
            pool.shutdown(wait=True)
            return
        except KeyboardInterrupt:  # one is already propagating
            continue
