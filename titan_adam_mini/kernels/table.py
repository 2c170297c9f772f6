"""What compiled code reads: the works of one call as a table of int64, one row per parameter, addresses included.

Built when the works change; addresses are those that `check` has found in this step, since FSDP2 replaces local tensors
and gradients.
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
    PARAM,  # addresses; the first five as a `Note` has them
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    STEP,
    GRAD,
    PRESENT,  # 0 where this rank has a gradient
    OWN_SUMS,  # one per line of the reach, before the exchange
    SUMS,  # one per line of the reach, or per block where FOLD says so, after it
    SCALE,  # one per block: what the momentum is multiplied with; the fold writes it, the update reads it
    BLOCK_OF_LINE,  # int32, where TILE is 0
    STARTS,  # int32, the first line of every block, where TILE is 0
    COUNTS,  # int64, elements per block, where COUNT is 0
    COLUMN,  # 0, or where `by_columns` the roots of its columns; those of its lines are SCALE
    COLUMN_SUMS,  # float64, one per outer index and column
    ROUNDING_OFFSET,  # as COLUMN_SUMS, see `columns.rounding_offset`; 0 where nothing is rounded
    PARTIALS,  # float64, one per line and piece of it
    COLUMN_SQ,  # second moments of columns, as COLUMN; their sums, complete, float64
    COLUMN_TOTALS,
    WHOLE_SQ,  # second moments of the whole, one per outer index; their sums, complete, WHOLE_FOLD each
    WHOLE_TOTALS,
    COUNT,  # integers from here on
    COLUMN_COUNT,  # elements per column, and of the whole
    WHOLE_COUNT,
    WHOLE_FOLD,
    GROUP,  # row of the table of hyper-parameters
    DECAY,
    SEED,  # of random rounding; -1: to nearest
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
    """The works of one call.

    Attributes:
        rows: int64 [works, COLUMNS].
        lines: of every work.
        by_columns: are the works? Then all are.
        factored: are the works' second moments?
        squares: where by columns, per work, where the sums of squares of its lines and its columns go; see `ParamStep`.
        roots: there too, what `columns.roots` says of them.
        one_line: per work, is every block one line that this rank alone holds? Then sums and update take one pass.
        scratch: room for the sums and scales of all others.
    """

    def __init__(self, works: Sequence[ParamStep], lines: Sequence[Lines]) -> None:
        self.lines = list(lines)
        self.by_columns, self.factored = works[0].by_columns, bool(works[0].factors)
        self.one_line = [
            work.sums is None and one.tile == 1 and not self.by_columns for work, one in zip(works, lines, strict=True)
        ]
        self.rows = np.zeros((len(works), COLUMNS), dtype=np.int64)
        self._notes: list[Note | None] = [None for _ in works]
        self._arrays: dict[tuple[bytes, str], Tensor] = {}
        device, dtype = works[0].param.device, works[0].exp_avg_sq.dtype
        groups = list({id(work.group): None for work in works})

        sizes = [
            (0, 0) if alone or self.by_columns else (0 if work.sums is not None else one.number, one.blocks)
            for work, one, alone in zip(works, lines, self.one_line, strict=True)
        ]
        self.scratch = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=device)
        free, width = self.scratch.data_ptr(), self.scratch.element_size()
        for row, work, one, (sums, blocks) in zip(self.rows, works, lines, sizes, strict=True):
            row[OWN_SUMS] = row[SUMS] = free
            row[SCALE] = free + sums * width
            free += (sums + blocks) * width
            if one.tile == 0:
                of_line = np.repeat(np.arange(one.blocks, dtype=np.int32), np.diff(one.starts))
                row[BLOCK_OF_LINE] = self._array(of_line, device)
                row[STARTS] = self._array(one.starts, device)
            if one.counts.size == 1:
                row[COUNT] = one.counts[0]
            elif one.counts.size:
                row[COUNTS] = self._array(one.counts, device)
            row[GROUP] = groups.index(id(work.group))
            row[DECAY], row[SEED] = work.decay, -1 if work.seed is None else work.seed
            row[LINES], row[INNER], row[WIDTH] = one.number, max(1, one.sizes[1]), one.sizes[2]
            row[FIRST], row[REACH_INNER], row[BLOCKS] = one.first, one.reach_inner, one.blocks
            row[TILE], row[FOLD] = one.tile, one.fold
            row[INDEX : INDEX_WIDTH + 1] = one.index or 0
        self.squares: list[tuple[Tensor, Tensor]] = []
        self.roots: list[tuple[Tensor, Tensor]] = []
        if self.by_columns:
            self._allocate(works)
        self.refresh(works)

    def _allocate(self, works: Sequence[ParamStep]) -> None:
        """Rooms for sums and roots, which stay where they are."""
        device, dtype = works[0].param.device, works[0].exp_avg_sq.dtype
        shapes = [((*stack, lines, 1), (*stack, 1, width)) for *stack, lines, width in (w.param.shape for w in works)]

        def rooms(which: int, kind: torch.dtype, value: float) -> list[Tensor]:
            sizes = [prod(shape[which]) for shape in shapes]
            parts = torch.full((sum(sizes),), value, dtype=kind, device=device).split(sizes)
            return [part.view(shape[which]) for part, shape in zip(parts, shapes, strict=True)]

        self.squares = list(zip(rooms(0, dtype, 0), rooms(1, torch.float64, 0), strict=True))
        # Of columns alone, the roots of lines stay 1.
        self.roots = list(zip(rooms(0, dtype, 1), rooms(1, dtype, 1), strict=True))
        self.place(OWN_SUMS, [of_rows for of_rows, _ in self.squares])
        self.place(COLUMN_SUMS, [of_columns for _, of_columns in self.squares])
        self.place(SCALE, [of_rows for of_rows, _ in self.roots])
        self.place(COLUMN, [of_columns for _, of_columns in self.roots])
        for row, work in zip(self.rows, works, strict=True):
            row[COLUMN_COUNT], row[WHOLE_COUNT] = work.plan.layout.shape[-2], prod(work.plan.layout.shape[-2:])
            if work.factors:
                whole = work.factors[1]
                row[WHOLE_FOLD] = work.param.shape[-2] if whole.sums is None else whole.plan.sums_shape[-2]

    def _array(self, values: np.ndarray, device: torch.device) -> int:
        """The address of constant values on the device, shared by all who ask for the same."""
        key = (values.tobytes(), str(values.dtype))
        if key not in self._arrays:
            self._arrays[key] = torch.from_numpy(values.copy()).to(device)
        return self._arrays[key].data_ptr()

    def place(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        """Put the addresses of tensors, one per work, into a column."""
        self.rows[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def refresh(self, works: Sequence[ParamStep]) -> None:
        """Take addresses and strides anew: all of what has another note than last time, else the gradient's."""
        for number, work in enumerate(works):
            if self._notes[number] is not work.note:
                self._notes[number] = work.note
                self._take(self.rows[number], work, self.lines[number])
        own, complete = self.rows[:, OWN_SUMS].tolist(), self.rows[:, SUMS].tolist()
        addresses: list[list[int]] = [
            [0 if work.grad is None else work.grad.data_ptr() for work in works],
            [0 if work.present is None or work.grad is not None else work.present.data_ptr() for work in works],
            [it if work.own_sums is None else work.own_sums.data_ptr() for it, work in zip(own, works, strict=True)],
            [it if work.sums is None else work.sums.data_ptr() for it, work in zip(complete, works, strict=True)],
        ]
        if self.by_columns:
            addresses[-2:] = [own, own]
        self.rows[:, GRAD:SCALE] = np.asarray(addresses, dtype=np.int64).T
        if self.by_columns:
            self._refresh_columns(works)

    def _refresh_columns(self, works: Sequence[ParamStep]) -> None:
        """Second moments of columns and of the whole, and what is averaged into them.

        What this rank has summed may be in another table's rooms: that of the works which had to be exchanged.
        """
        squares = [
            own if work.squares is None else work.squares[0] for work, own in zip(works, self.squares, strict=True)
        ]
        of_rows, of_columns = zip(*squares, strict=True)
        grids = [columns.column_grid(work) for work in works]
        self.place(COLUMN_SQ, [grid.exp_avg_sq for grid in grids])
        self.place(COLUMN_TOTALS, [_or(grid.sums, own) for grid, own in zip(grids, of_columns, strict=True)])
        if self.factored:
            wholes = [work.factors[1] for work in works]
            self.place(SUMS, [_or(work.sums, own) for work, own in zip(works, of_rows, strict=True)])
            self.place(WHOLE_SQ, [grid.exp_avg_sq for grid in wholes])
            self.place(WHOLE_TOTALS, [_or(grid.sums, own) for grid, own in zip(wholes, of_rows, strict=True)])

    def _take(self, row: np.ndarray, work: ParamStep, lines: Lines) -> None:
        """The addresses of the parameter and its state, and the strides along its lines."""
        assert work.note is not None
        row[PARAM:GRAD] = work.note.facts[:GRAD]
        tensors = (work.param, work.param if work.grad is None else work.grad, work.exp_avg)
        strides = [lines.strides(tensor) for tensor in tensors]
        assert None not in strides, f"{work.name}: compiled code cannot read {strides}"
        row[PARAM_OUTER:COLUMNS] = [stride for along in strides for stride in along or ()]


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def hyper_parameters(works: Sequence[ParamStep]) -> np.ndarray:
    """The groups' hyper-parameters, float64 [groups, 8], in the order of Table's GROUP; an lr on a device reads 0."""
    values = []
    for group in {id(work.group): work.group for work in works}.values():
        lr, (beta1, beta2) = group["lr"], map(float, group["betas"])
        rate = 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        logs = (np.log(beta) if beta else -np.inf for beta in (beta1, beta2))
        values.append((rate, beta1, beta2, group["eps"], group["weight_decay"], float(bool(group["maximize"])), *logs))
    return np.asarray(values, dtype=np.float64).reshape(-1, 8)
