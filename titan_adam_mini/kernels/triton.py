"""The fused engine for GPUs: all tensors of a call in a constant number of launches.

A list assigns a tile of a parameter to every program; addresses and hyper-parameters are read from tables on the
device. Nothing waits for the host: step counts, bias corrections and missing gradients are handled on the device. A
step has at most 14 launches per combination of dtypes, for any number of tensors: preparation, blocks of one line,
sums, fold and update; all but the second again for straddling blocks; and lines of up to 64 elements separately from
longer ones. Transposed tensors have separate launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ParamStep, table, triton_columns, triton_kernels
from .compiled import Compiled
from .table import Table, hyper_parameters
from .tensorwise import Tensorwise

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def _tile(param: torch.dtype, exp_avg: torch.dtype) -> tuple[int, int]:
    """Elements per tile of a program, and its warps: the fastest of six tried on an H100.

    int8 momentum uses half of the elements, as full runs.
    """
    if exp_avg == torch.int8:
        return 2048, 8 if param == torch.float32 else 4
    return (2048, 8) if param == exp_avg == torch.float32 else (1024, 8)


STRIDES = slice(table.PARAM_OUTER, table.COLUMNS)
_STARTS = (table.PARAM_OUTER, table.GRAD_OUTER, table.EXP_AVG_OUTER)


class _Programs:
    """A table's copy on the device, and the tile of every program."""

    def __init__(self, own: Table, param: torch.dtype, exp_avg: torch.dtype) -> None:
        device = own.scratch.device
        self.tile, self.warps = _tile(param, exp_avg)
        self.number = len(own.rows)
        self.values = np.empty(0, dtype=np.int64)
        self.strides = own.rows[:, STRIDES].copy()
        self.rows = torch.empty(own.rows.shape, dtype=torch.int64, device=device)
        self.hyper_values = np.empty((0, 8))
        self.hyper = torch.empty((0, 8), dtype=torch.float64, device=device)
        self.scalars = torch.empty((self.number, triton_kernels.SCALARS), dtype=torch.float32, device=device)
        names = ("one_line", "many", "fold", "strips", "columns", "wholes", "rows")
        found: dict[str, dict[tuple[int, bool], list[np.ndarray]]] = {name: {} for name in names}
        for number, (row, lines, alone) in enumerate(zip(own.rows, own.lines, own.one_line, strict=True)):
            outer, inner, width = lines.sizes
            if width and outer * inner:
                unit = _unit(row)
                part = _triples(number, outer, inner, _lines_of_program(width, unit, exp_avg == torch.int8, self.tile))
                narrow = width <= triton_kernels.NARROW
                found["one_line" if alone else "many"].setdefault((unit, narrow), []).append(part)
                if own.by_columns:
                    strips = _triples(number, outer, width, triton_columns.STRIP)
                    found["strips"].setdefault((unit, False), []).append(strips)
            # Second moments are shared by all ranks: update them even if this rank has no rows.
            parts = [("columns", width, triton_columns.MANY)] if own.by_columns else []
            parts += [("wholes", 1, 1), ("rows", inner, triton_columns.MANY)] if own.factored else []
            for name, size, each in parts:
                found[name].setdefault((1, False), []).append(_triples(number, outer, size, each))
            if not alone and not own.by_columns:
                each = triton_kernels.FOLDED if lines.fold == 1 else 1
                found["fold"].setdefault((1, False), []).append(_triples(number, 1, lines.blocks, each))
        self.lists = {
            name: {kind: torch.from_numpy(np.concatenate(parts)).to(device) for kind, parts in kinds.items()}
            for name, kinds in found.items()
        }


def _lines_of_program(width: int, unit: int, runs: bool, tile: int) -> int:
    """Lines per program in the kernels of lines; `runs`: with int8 momentum, where a tile is part of one line."""
    if runs:
        return 1
    if unit == 0:
        return 64
    if width == 1:
        return tile // 2
    return tile // triton_kernels.NARROW if width <= triton_kernels.NARROW else 1


def _triples(number: int, outer: int, inner: int, lines: int) -> np.ndarray:
    """int32 [programs, 3]: row of the table, outer index, first line; tiles of `lines` over every outer index."""
    starts = np.arange(0, inner, lines, dtype=np.int32)
    triples = np.empty((outer, len(starts), 3), dtype=np.int32)
    triples[:, :, 0], triples[:, :, 1], triples[:, :, 2] = number, np.arange(outer)[:, None], starts
    return triples.reshape(-1, 3)


def _unit(row: np.ndarray) -> int:
    """The dim with stride 1 in all three tensors: 0 lines, 1 columns, 2 neither."""
    if row[table.WIDTH] == 1 or all(row[start + 2] == 1 for start in _STARTS):
        return 1
    return 0 if all(row[start + 1] == 1 for start in _STARTS) else 2


class TritonEngine(Compiled):
    """See the module docstring; `launches` counts kernel launches."""

    version = f"fused, torch {torch.__version__}, triton {triton.__version__}"
    device_type = "cuda"
    step_on_device = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, plain: Tensorwise) -> None:
        super().__init__(plain)
        self.launches = 0
        self._programs: WeakKeyDictionary[Table, _Programs] = WeakKeyDictionary()
        self._graph_inputs: list[Tensor] = []

    def run_sums(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_sums`."""
        here = self._here(table, param_steps)
        for name in ("one_line", "many"):
            self._line_sums(here, name, param_steps)

    def run_update(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_update`."""
        here, first = self._here(table, param_steps), param_steps[0]
        if not table.by_columns:
            self._prepare(here, param_steps)
        if first.grad is None:
            self._launch(triton_kernels.fold, here, "fold", here.scalars)
            return
        types = {"P": _TYPES[first.param.dtype], "G": _TYPES[first.grad.dtype], "M": _TYPES[first.exp_avg.dtype]}
        types["ROUND"] = first.seed is not None and first.param.dtype == torch.bfloat16
        self._launch(triton_kernels.one_line_blocks, here, "one_line", here.scalars, **types)
        if first.sums is None and not table.by_columns:
            self._line_sums(here, "many", param_steps)
        self._launch(triton_kernels.fold, here, "fold", here.scalars)
        self._launch(triton_kernels.update_lines, here, "many", here.scalars, **types, BY_COLUMNS=table.by_columns)

    def _prepare(self, here: _Programs, param_steps: Sequence[ParamStep]) -> None:
        self._load_hyper(here, param_steps)
        self.launches += 1
        with _device(here.rows.device):
            triton_kernels.prepare[(triton.cdiv(here.number, 128),)](
                here.rows, here.hyper, here.scalars, here.number, BLOCK=128
            )

    def run_squares(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_squares`."""
        here = self._here(table, param_steps)
        self._load_hyper(here, param_steps)
        if table.factored:
            self._line_sums(here, "many", param_steps)
        assert param_steps[0].grad is not None
        self._launch(triton_columns.column_sums, here, "strips", here.hyper, G=_TYPES[param_steps[0].grad.dtype])

    def run_moments(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """See `Compiled.run_moments`."""
        here = self._here(table, param_steps)
        self._prepare(here, param_steps)
        self._launch(triton_columns.column_moments, here, "columns", here.scalars)
        self._launch(triton_columns.whole_moments, here, "wholes", here.scalars)
        self._launch(triton_columns.row_moments, here, "rows", here.scalars)

    def _line_sums(self, here: _Programs, name: str, param_steps: Sequence[ParamStep]) -> None:
        assert param_steps[0].grad is not None
        types = {"G": _TYPES[param_steps[0].grad.dtype], "M": _TYPES[param_steps[0].exp_avg.dtype]}
        self._launch(triton_kernels.line_sums, here, name, **types)

    def _launch(self, kernel: Any, here: _Programs, name: str, *args: Tensor, **constants: Any) -> None:
        """At most one launch for narrow lines and one for others."""
        with _device(here.rows.device):
            for (unit, narrow), programs in here.lists[name].items():
                if not len(programs):
                    continue
                self.launches += 1
                shape = {"UNIT": unit} if name in ("one_line", "many", "strips") else {}
                shape |= {"NARROW": narrow, "TILE": here.tile} if name in ("one_line", "many") else {}
                kernel[(len(programs),)](
                    here.rows, *args, programs, **constants, **shape, num_warps=here.warps, enable_fp_fusion=False
                )

    def _here(self, table: Table, param_steps: Sequence[ParamStep]) -> _Programs:
        """The table's copy on the device, updated if an address has changed."""
        here, rows = self._programs.get(table), table.rows
        if here is not None and np.array_equal(here.values, rows):
            return here
        if here is None or not np.array_equal(here.strides, rows[:, STRIDES]):
            here = self._programs[table] = _Programs(table, param_steps[0].param.dtype, param_steps[0].exp_avg.dtype)
        here.values = rows.copy()
        self._copy(here.values, here.rows)
        return here

    def _load_hyper(self, here: _Programs, param_steps: Sequence[ParamStep]) -> None:
        """Copy hyper-parameters to the device if they have changed; a learning rate on the device stays there."""
        values = hyper_parameters(param_steps)
        if not np.array_equal(values, here.hyper_values):
            if values.shape != here.hyper_values.shape:
                here.hyper = torch.empty(values.shape, dtype=torch.float64, device=here.rows.device)
            here.hyper_values = values
            self._copy(values, here.hyper)
        for number, group in enumerate({id(param_step.group): param_step.group for param_step in param_steps}.values()):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                here.hyper[number, table.LR].copy_(lr)

    def _copy(self, values: np.ndarray, target: Tensor) -> None:
        """Copy to the device asynchronously, from pinned memory, which torch keeps until the copy is done."""
        source = torch.from_numpy(values.copy())
        if target.device.type == "cuda":
            source = source.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._graph_inputs.append(source)  # a graph reads it in every replay
        target.copy_(source, non_blocking=True)


def _device(device: torch.device) -> Any:
    """Make a device current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
