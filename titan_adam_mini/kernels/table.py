"""The input of compiled code: an int64 table with one row per parameter of a call, including addresses.

Built when the set of parameters changes. Addresses are those found by `check` in the current step, since FSDP2 replaces
local tensors and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from . import ParamStep, columns
from .check import Note
from .lines import Lines

(
    PARAM,  # addresses; the first five as in a `Note`
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    STEP,
    GRAD,
    PRESENT,  # 0 where this rank has a gradient
    OWN_SUMS,  # one per line of the reach, before the exchange
    SUMS,  # one per line of the reach, or per block depending on FOLD, after the exchange
    SCALE,  # one per block: the factor for the momentum; written by the fold, read by the update
    BLOCK_OF_LINE,  # int32, if TILE is 0
    STARTS,  # int32, the first line of every block, if TILE is 0
    COUNTS,  # int64, elements per block, if COUNT is 0
    COLUMN,  # 0, or with `by_columns` the roots of its columns; those of its lines are in SCALE
    COLUMN_SUMS,  # float64, one per outer index and column
    ROUNDING_OFFSET,  # as COLUMN_SUMS, see `columns.rounding_offset`; 0 if nothing is rounded
    PARTIALS,  # float64, one per line and piece of it
    COLUMN_SQ,  # second moments of columns, as COLUMN; their complete sums, float64
    COLUMN_TOTALS,
    WHOLE_SQ,  # second moments of full matrices, one per outer index; their complete sums, WHOLE_FOLD each
    WHOLE_TOTALS,
    COUNT,  # integers from here on
    COLUMN_COUNT,  # elements per column, and of the full matrix
    WHOLE_COUNT,
    WHOLE_FOLD,
    GROUP,  # row of the table of hyper-parameters
    DECAY,
    SEED,  # of stochastic rounding; -1: to nearest
    LINES,
    INNER,
    WIDTH,
    FIRST,
    REACH_INNER,
    BLOCKS,
    TILE,
    FOLD,
    INDEX,
    INDEX_OUTER,
    INDEX_INNER,
    INDEX_WIDTH,
    PARAM_OUTER,  # strides, in elements
    PARAM_INNER,
    PARAM_WIDTH,
    GRAD_OUTER,
    GRAD_INNER,
    GRAD_WIDTH,
    EXP_AVG_OUTER,
    EXP_AVG_INNER,
    EXP_AVG_WIDTH,
) = range(49)
COLUMNS = 49

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE, LOG_BETA1, LOG_BETA2 = range(8)
"""Columns of the table of hyper-parameters, float64, one row per group."""


class Table:
    """The parameters of one call.

    Attributes:
        rows: int64 [parameters, COLUMNS].
        lines: of every parameter.
        by_columns: whether the parameters are (all or none).
        factored: whether their second moments are.
        squares: with by_columns, per parameter, buffers for the sums of squares of its lines and columns; see
            `ParamStep`.
        roots: with by_columns, buffers for the result of `columns.roots`.
        one_line: per parameter, whether every block is one line that is complete here; sums and update then take one
            pass.
        scratch: memory for the sums and scales of all others.
    """

    def __init__(self, param_steps: Sequence[ParamStep], lines: Sequence[Lines]) -> None:
        self.lines = list(lines)
        self.by_columns, self.factored = param_steps[0].by_columns, bool(param_steps[0].factors)
        self.one_line = [
            param_step.sums is None and param_lines.tile == 1 and not self.by_columns
            for param_step, param_lines in zip(param_steps, lines, strict=True)
        ]
        self.rows = np.zeros((len(param_steps), COLUMNS), dtype=np.int64)
        self._notes: list[Note | None] = [None for _ in param_steps]
        self._arrays: dict[tuple[bytes, str], Tensor] = {}
        device, dtype = param_steps[0].param.device, param_steps[0].exp_avg_sq.dtype
        groups = list({id(param_step.group): None for param_step in param_steps})

        sizes = [
            (0, 0)
            if alone or self.by_columns
            else (0 if param_step.sums is not None else param_lines.number, param_lines.blocks)
            for param_step, param_lines, alone in zip(param_steps, lines, self.one_line, strict=True)
        ]
        self.scratch = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=device)
        free, width = self.scratch.data_ptr(), self.scratch.element_size()
        for row, param_step, param_lines, (sums, blocks) in zip(self.rows, param_steps, lines, sizes, strict=True):
            row[OWN_SUMS] = row[SUMS] = free
            row[SCALE] = free + sums * width
            free += (sums + blocks) * width
            if param_lines.tile == 0:
                of_line = np.repeat(np.arange(param_lines.blocks, dtype=np.int32), np.diff(param_lines.starts))
                row[BLOCK_OF_LINE] = self._array(of_line, device)
                row[STARTS] = self._array(param_lines.starts, device)
            if param_lines.counts.size == 1:
                row[COUNT] = param_lines.counts[0]
            elif param_lines.counts.size:
                row[COUNTS] = self._array(param_lines.counts, device)
            row[GROUP] = groups.index(id(param_step.group))
            row[DECAY], row[SEED] = param_step.decay, -1 if param_step.seed is None else param_step.seed
            row[LINES], row[INNER], row[WIDTH] = param_lines.number, max(1, param_lines.sizes[1]), param_lines.sizes[2]
            row[FIRST], row[REACH_INNER], row[BLOCKS] = param_lines.first, param_lines.reach_inner, param_lines.blocks
            row[TILE], row[FOLD] = param_lines.tile, param_lines.fold
            row[INDEX : INDEX_WIDTH + 1] = param_lines.index or 0
        self.squares: list[tuple[Tensor, Tensor]] = []
        self.roots: list[tuple[Tensor, Tensor]] = []
        if self.by_columns:
            self._allocate(param_steps)
        self.refresh(param_steps)

    def _allocate(self, param_steps: Sequence[ParamStep]) -> None:
        """Allocate the buffers for sums and roots; their addresses do not change."""
        device, dtype = param_steps[0].param.device, param_steps[0].exp_avg_sq.dtype
        shapes = [
            ((*stack, lines, 1), (*stack, 1, width)) for *stack, lines, width in (w.param.shape for w in param_steps)
        ]

        def allocate(which: int, kind: torch.dtype, value: float) -> list[Tensor]:
            sizes = [prod(shape[which]) for shape in shapes]
            parts = torch.full((sum(sizes),), value, dtype=kind, device=device).split(sizes)
            return [part.view(shape[which]) for part, shape in zip(parts, shapes, strict=True)]

        self.squares = list(zip(allocate(0, dtype, 0), allocate(1, torch.float64, 0), strict=True))
        # Without factors, the roots of lines stay 1.
        self.roots = list(zip(allocate(0, dtype, 1), allocate(1, dtype, 1), strict=True))
        self.place(OWN_SUMS, [of_rows for of_rows, _ in self.squares])
        self.place(COLUMN_SUMS, [of_columns for _, of_columns in self.squares])
        self.place(SCALE, [of_rows for of_rows, _ in self.roots])
        self.place(COLUMN, [of_columns for _, of_columns in self.roots])
        for row, param_step in zip(self.rows, param_steps, strict=True):
            row[COLUMN_COUNT], row[WHOLE_COUNT] = (
                param_step.plan.layout.shape[-2],
                prod(param_step.plan.layout.shape[-2:]),
            )
            if param_step.factors:
                whole = param_step.factors[1]
                row[WHOLE_FOLD] = param_step.param.shape[-2] if whole.sums is None else whole.plan.sums_shape[-2]

    def _array(self, values: np.ndarray, device: torch.device) -> int:
        """The address of constant values on the device; equal values are shared."""
        key = (values.tobytes(), str(values.dtype))
        if key not in self._arrays:
            self._arrays[key] = torch.from_numpy(values.copy()).to(device)
        return self._arrays[key].data_ptr()

    def place(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        """Write the addresses of tensors, one per parameter, into a column."""
        self.rows[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def refresh(self, param_steps: Sequence[ParamStep]) -> None:
        """Update addresses and strides: all of a parameter if its note has changed, else only the gradient's."""
        for number, param_step in enumerate(param_steps):
            if self._notes[number] is not param_step.note:
                self._notes[number] = param_step.note
                self._take(self.rows[number], param_step, self.lines[number])
        own, complete = self.rows[:, OWN_SUMS].tolist(), self.rows[:, SUMS].tolist()
        addresses: list[list[int]] = [
            [0 if param_step.grad is None else param_step.grad.data_ptr() for param_step in param_steps],
            [
                0 if param_step.present is None or param_step.grad is not None else param_step.present.data_ptr()
                for param_step in param_steps
            ],
            [
                it if param_step.own_sums is None else param_step.own_sums.data_ptr()
                for it, param_step in zip(own, param_steps, strict=True)
            ],
            [
                it if param_step.sums is None else param_step.sums.data_ptr()
                for it, param_step in zip(complete, param_steps, strict=True)
            ],
        ]
        if self.by_columns:
            addresses[-2:] = [own, own]
        self.rows[:, GRAD:SCALE] = np.asarray(addresses, dtype=np.int64).T
        if self.by_columns:
            self._refresh_columns(param_steps)

    def _refresh_columns(self, param_steps: Sequence[ParamStep]) -> None:
        """Update the addresses of second moments of columns and full matrices, and of their sums.

        This rank's sums may be in the buffers of another table, which has only the exchanged parameters.
        """
        squares = [
            own if param_step.squares is None else param_step.squares[0]
            for param_step, own in zip(param_steps, self.squares, strict=True)
        ]
        of_rows, of_columns = zip(*squares, strict=True)
        grids = [columns.column_grid(param_step) for param_step in param_steps]
        self.place(COLUMN_SQ, [grid.exp_avg_sq for grid in grids])
        self.place(COLUMN_TOTALS, [_or(grid.sums, own) for grid, own in zip(grids, of_columns, strict=True)])
        if self.factored:
            wholes = [param_step.factors[1] for param_step in param_steps]
            self.place(SUMS, [_or(param_step.sums, own) for param_step, own in zip(param_steps, of_rows, strict=True)])
            self.place(WHOLE_SQ, [grid.exp_avg_sq for grid in wholes])
            self.place(WHOLE_TOTALS, [_or(grid.sums, own) for grid, own in zip(wholes, of_rows, strict=True)])

    def _take(self, row: np.ndarray, param_step: ParamStep, lines: Lines) -> None:
        """Write the addresses of the parameter and its state, and the strides along its lines."""
        assert param_step.note is not None
        row[PARAM:GRAD] = param_step.note.facts[:GRAD]
        tensors = (
            param_step.param,
            param_step.param if param_step.grad is None else param_step.grad,
            param_step.exp_avg,
        )
        strides = [lines.strides(tensor) for tensor in tensors]
        assert None not in strides, f"{param_step.name}: compiled code cannot read {strides}"
        row[PARAM_OUTER:COLUMNS] = [stride for along in strides for stride in along or ()]


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def hyper_parameters(param_steps: Sequence[ParamStep]) -> np.ndarray:
    """The groups' hyper-parameters, float64 [groups, 8], in the order of Table's GROUP; 0 for an lr on a GPU."""
    values = []
    for group in {id(param_step.group): param_step.group for param_step in param_steps}.values():
        lr, (beta1, beta2) = group["lr"], map(float, group["betas"])
        rate = 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        logs = (np.log(beta) if beta else -np.inf for beta in (beta1, beta2))
        values.append((rate, beta1, beta2, group["eps"], group["weight_decay"], float(bool(group["maximize"])), *logs))
    return np.asarray(values, dtype=np.float64).reshape(-1, 8)
