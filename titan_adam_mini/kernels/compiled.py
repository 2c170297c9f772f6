"""What the two compiled engines share: who is served by compiled code, in which tables, and what is left to torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import Factor, Work, columns, int8, log
from .lines import Lines, lines_of
from .table import Table
from .tensorwise import Tensorwise

TABLES = 32
"""Tables kept: one per call and combination of dtypes, and per pattern of missing gradients."""


class Compiled:
    """An engine (see `kernels.Engine`) over tables of works; what it cannot take goes to `plain`, logged once."""

    name = "fused"
    device_type = ""
    step_on_device = False
    precisions: tuple[torch.dtype, ...] = (torch.float32,)
    """Dtypes of second moments that the engine computes in."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Dtypes of parameters, gradients and momentum that it reads; and int8 momentum."""

    def __init__(self, plain: Tensorwise) -> None:
        self.plain = plain
        self.forget()

    def forget(self) -> None:
        """See `Engine.forget`."""
        self._lines: dict[str, Lines | str] = {}
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._left: dict[str, str] = {}

    def run_sums(self, table: Table, works: Sequence[Work]) -> None:
        """The sums of squares of `works`, all of one dtype combination, into their `own_sums`."""
        raise NotImplementedError

    def run_update(self, table: Table, works: Sequence[Work]) -> None:
        """One step of `works`, all of one dtype combination, with a gradient or all without, by columns all or none."""
        raise NotImplementedError

    def run_squares(self, table: Table, works: Sequence[Work]) -> None:
        """Sums of squares of columns to `table.squares`, and of lines if `table.factored`."""
        raise NotImplementedError

    def run_moments(self, table: Table, works: Sequence[Work]) -> None:
        """Advance the second moments of works by columns, and leave their roots in `table.roots`."""
        for work, (of_rows, of_columns) in zip(works, table.roots, strict=True):
            self.plain.advance(work)
            if not work.param.numel():
                continue
            step = work.step.to(torch.float64) + 1
            ((rows, here),) = columns.roots(work, 1 - work.group["betas"][1] ** step)
            of_rows.copy_(rows)
            of_columns.copy_(here)

    def square_sums(self, works: Sequence[Work]) -> None:
        """See `Engine.square_sums`."""
        mine, rest = self._mine(works)
        together = [work for work in mine if not (work.by_columns or self._line(work).summable)]
        self.plain.square_sums(rest + together)
        matrices = [work for work in mine if work.by_columns]
        self._take_squares(matrices)
        columns.share(matrices)
        alone = [work for work in mine if not work.by_columns and self._line(work).summable]
        for table, members in self._by_dtypes("sums", alone):
            self.run_sums(table, members)
            table.release()

    def update(self, works: Sequence[Work]) -> None:
        """See `Engine.update`."""
        mine, rest = self._mine(works)
        # What this rank alone holds, or columns, with a gradient elsewhere but not here: rare, and no matter for speed.
        idle = [work for work in mine if work.grad is None and (work.sums is None or work.by_columns)]
        self._update_by_columns([work for work in mine if work.grad is not None and work.by_columns])
        mine = [work for work in mine if not work.by_columns and (work.grad is not None or work.sums is not None)]
        for table, members in self._by_dtypes("update", mine):
            self.run_update(table, members)
            table.release()
        self.plain.update(rest + idle)

    def _take_squares(self, works: Sequence[Work]) -> None:
        """`columns.take_squares` of all works."""
        for table, members in self._by_columns(works):
            for work, squares in zip(members, table.squares, strict=True):
                work.squares = [squares]
            self.run_squares(table, members)
            table.release()

    def _update_by_columns(self, works: Sequence[Work]) -> None:
        self._take_squares([work for work in works if work.squares is None])
        for table, members in self._by_columns(works):
            self.run_moments(table, members)
            self.run_update(table, members)
            table.release()

    def _by_columns(self, works: Sequence[Work]) -> Iterable[tuple[Table, list[Work]]]:
        for kind, factored in (("columns", False), ("factored", True)):
            yield from self._by_dtypes(kind, [work for work in works if bool(work.factors) == factored])

    def _line(self, work: Work) -> Lines:
        lines = self._lines[work.name]
        assert isinstance(lines, Lines)
        return lines

    def _mine(self, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Works for compiled code, and those left to torch's operations."""
        mine: list[Work] = []
        rest: list[Work] = []
        new: dict[str, str] = {}
        for work in works:
            reason = self._left.get(work.name)
            if reason is None and work.name not in self._lines:
                self._lines[work.name] = lines = lines_of(work.plan.of_rows if work.plan.of_columns else work.plan)
                reason = lines if isinstance(lines, str) else self._reason(work, lines)
                if reason is not None:
                    self._left[work.name] = new[work.name] = reason
            served = reason is None and (work.grad is None or work.grad.dtype in self.dtypes)
            if work.exp_avg_scale is not None:
                served = served and work.exp_avg.data_ptr() % 16 == 0  # read many at a time
            (mine if served else rest).append(work)
        for reason in dict.fromkeys(new.values()):
            names = [name for name, why in new.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            log.info(f"AdamMini: {self.plain.name} instead of {self.name} for {', '.join(names[:3])}{more}: {reason}")
        return mine, rest

    def _reason(self, work: Work, lines: Lines) -> str | None:
        """Why a parameter cannot be served by compiled code; None if it can."""
        kinds = [work.param.dtype, work.exp_avg.dtype, *([] if work.grad is None else [work.grad.dtype])]
        unknown = [str(one) for one in kinds if one not in (*self.dtypes, torch.int8)]
        if work.param.device.type != self.device_type:
            return f"it is on {work.param.device.type}"
        if work.exp_avg_sq.dtype not in self.precisions:
            return f"second moments are {work.exp_avg_sq.dtype}"
        if unknown:
            return f"a tensor is {unknown[0]}"
        if work.by_columns and lines.dims[2] != (len(work.plan.layout.shape) - 1,):
            return "its rows are of one element"
        grids: list[Work | Factor] = [work, *work.factors]
        sums = [grid.sums for grid in grids if not grid.plan.of_columns]
        if wide := [one.dtype for one in sums if one is not None and one.dtype != work.exp_avg_sq.dtype]:
            return f"its sums travel as {wide[0]}"
        if None in (lines.strides(work.param), lines.strides(work.exp_avg)):
            return "its dims do not follow each other in memory"
        if work.seed is not None and work.param.dtype == torch.bfloat16 and lines.index is None:
            return "its elements' numbers are not regular"
        rows = lines.dims[2][-1:] == (len(work.plan.layout.shape) - 1,) and lines.sizes[2] % int8.RUN == 0
        if work.exp_avg_scale is not None and work.param.numel() and not rows:
            return "its int8 runs are not inside the rows that are summed"
        return None

    def _by_dtypes(self, kind: str, works: Sequence[Work]) -> Iterable[tuple[Table, list[Work]]]:
        """The works with their tables, one per device and combination of dtypes; addresses are up to date."""
        alike: dict[tuple[Any, ...], list[Work]] = {}
        for work in works:
            grad = None if work.grad is None else work.grad.dtype
            rounds = work.seed is not None and work.param.dtype == torch.bfloat16
            own = (kind, work.param.device, work.exp_avg_sq.dtype, work.param.dtype, grad, work.exp_avg.dtype, rounds)
            alike.setdefault(own, []).append(work)
        for own, members in alike.items():
            key = (*own, *(work.name for work in members))
            table = self._tables.get(key)
            if table is None:
                if len(self._tables) >= TABLES:  # where gradients come and go
                    del self._tables[next(iter(self._tables))]
                table = self._tables[key] = Table(members, [self._line(work) for work in members])
            else:
                table.refresh(members)
            yield table, members
