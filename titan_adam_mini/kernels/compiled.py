"""What the two compiled engines share: who is served by compiled code, in which tables, and what is left to torch.

What serves a parameter follows from what all ranks share (see `Spec`), so that its sums are added in one order
everywhere. Where this rank's tensors lie in memory as compiled code cannot read them, it works on copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import Factor, ParamStep, Spec, columns, log
from .check import check, rounds
from .lines import Lines, grouped, lines_of, not_lines, numbered
from .table import Table
from .tensorwise import Tensorwise

TABLES = 32
"""Tables kept: one per call and combination of dtypes, and per pattern of missing gradients."""
COPIED = 1 << 24
"""Elements of parameters that are worked on as copies at a time, at least."""


class Compiled:
    """An engine (see `kernels.Engine`) over tables of works; what it cannot take goes to `plain`, logged once."""

    name = "fused"
    version = "fused"
    device_type = ""
    step_on_device = False
    precisions: tuple[torch.dtype, ...] = (torch.float32,)
    """Dtypes of second moments that the engine computes in."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Dtypes of parameters, gradients and momentum that it reads; and int8 momentum."""

    def __init__(self, plain: Tensorwise) -> None:
        self.plain = plain
        self._lines: dict[str, Lines] = {}
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._left: dict[str, str] = {}
        self._copied: dict[str, str] = {}

    def run_sums(self, table: Table, works: Sequence[ParamStep]) -> None:
        """The sums of squares of `works`, all of one dtype combination, into their `own_sums`."""
        raise NotImplementedError

    def run_update(self, table: Table, works: Sequence[ParamStep]) -> None:
        """One step of `works`, all of one dtype combination, with a gradient or all without, by columns all or none."""
        raise NotImplementedError

    def run_squares(self, table: Table, works: Sequence[ParamStep]) -> None:
        """Sums of squares of columns to `table.squares`, and of lines if `table.factored`."""
        raise NotImplementedError

    def run_moments(self, table: Table, works: Sequence[ParamStep]) -> None:
        """Advance the second moments of works by columns, and leave their roots in `table.roots`."""
        for work, (of_rows, of_columns) in zip(works, table.roots, strict=True):
            self.plain.advance(work)
            if not work.param.numel():
                continue
            step = work.step.to(torch.float64) + 1
            ((rows, here),) = columns.roots(work, 1 - work.group["betas"][1] ** step)
            of_rows.copy_(rows)
            of_columns.copy_(here)

    def check(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.check`."""
        check(works, self.step_on_device)

    def square_sums(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.square_sums`."""
        mine, rest = self._divided(works)
        self.plain.square_sums(rest)
        for batch in self._batches(mine):
            self._square_sums([copy for _, copy in batch])
            for work, copy in batch:
                work.squares = copy.squares
                if work.own_sums is not None and copy.own_sums is not work.own_sums:
                    work.own_sums.copy_(copy.own_sums)

    def _square_sums(self, works: Sequence[ParamStep]) -> None:
        self.plain.square_sums([work for work in works if not (work.by_columns or self._line(work).summable)])
        matrices = [work for work in works if work.by_columns]
        self._take_squares(matrices)
        columns.share(matrices)
        alone = [work for work in works if not work.by_columns and self._line(work).summable]
        for table, members in self._by_dtypes("sums", alone):
            self.run_sums(table, members)

    def update(self, works: Sequence[ParamStep]) -> None:
        """See `Engine.update`."""
        mine, rest = self._divided(works)
        # What this rank alone holds, or columns, with a gradient elsewhere but not here: rare, and no matter for speed.
        idle = [work for work in mine if work.grad is None and (work.sums is None or work.by_columns)]
        mine = [work for work in mine if work.grad is not None or (work.sums is not None and not work.by_columns)]
        self.plain.update(rest + idle)
        for batch in self._batches(mine):
            here = [copy for _, copy in batch]
            self._update_by_columns([work for work in here if work.by_columns])
            for table, members in self._by_dtypes("update", [work for work in here if not work.by_columns]):
                self.run_update(table, members)
            for work, copy in batch:
                if copy is not work:
                    _copy_back(work, copy)
        for work in works:
            work.checked = False

    def _take_squares(self, works: Sequence[ParamStep]) -> None:
        """`columns.take_squares` of all works."""
        for table, members in self._by_columns(works):
            for work, squares in zip(members, table.squares, strict=True):
                work.squares = [squares]
            self.run_squares(table, members)

    def _update_by_columns(self, works: Sequence[ParamStep]) -> None:
        self._take_squares([work for work in works if work.squares is None])
        for table, members in self._by_columns(works):
            self.run_moments(table, members)
            self.run_update(table, members)

    def _by_columns(self, works: Sequence[ParamStep]) -> Iterable[tuple[Table, list[ParamStep]]]:
        for kind, factored in (("columns", False), ("factored", True)):
            yield from self._by_dtypes(kind, [work for work in works if bool(work.factors) == factored])

    def _line(self, work: ParamStep) -> Lines:
        return self._lines[work.name]

    def _divided(self, works: Sequence[ParamStep]) -> tuple[list[ParamStep], list[ParamStep]]:
        """Works for compiled code, and those left to torch's operations; all are checked, and their notes complete."""
        if unchecked := [work for work in works if not work.checked]:
            self.check(unchecked)
        mine: list[ParamStep] = []
        rest: list[ParamStep] = []
        left: dict[str, str] = {}
        copied: dict[str, str] = {}
        for work in works:
            name, note = work.name, work.note
            assert note is not None and work.spec is not None
            if name not in self._lines and name not in self._left:
                reason = self.fallback(work.spec)
                if reason is not None:
                    self._left[name] = left[name] = reason
                else:
                    lines = lines_of(work.plan.of_rows if work.plan.of_columns else work.plan)
                    assert isinstance(lines, Lines), lines
                    self._lines[name] = lines
            if name in self._left:
                rest.append(work)
                continue
            if note.copied is None:
                reasons = self._unreadable(work, self._lines[name])
                note.copied = tuple(reasons)
                if reasons and name not in self._copied:
                    self._copied[name] = copied[name] = "; ".join(f"{key} {why}" for key, why in reasons.items())
            mine.append(work)
        self._log_once(f"{self.plain.name} instead of {self.name} for", left)
        self._log_once(f"{self.name} works on copies of", copied)
        return mine, rest

    def _log_once(self, words: str, reasons: dict[str, str]) -> None:
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            log.info(f"AdamMini: {words} {', '.join(names[:3])}{more}: {reason}")

    def fallback(self, spec: Spec) -> str | None:
        """See `Engine.fallback`."""
        unknown = [str(one) for one in (spec.param, spec.exp_avg) if one not in (*self.dtypes, torch.int8)]
        if spec.device != self.device_type:
            return f"it is on {spec.device}"
        if spec.exp_avg_sq not in self.precisions:
            return f"second moments are {spec.exp_avg_sq}"
        if unknown:
            return f"a tensor is {unknown[0]}"
        plan = spec.plans[0].of_rows if spec.plans[0].of_columns else spec.plans[0]
        if (reason := not_lines(plan)) is not None:
            return reason
        last, inside = len(plan.layout.shape) - 1, grouped(plan)[2]
        if (len(spec.plans) > 1 or spec.plans[0].of_columns) and inside != (last,):
            return "its rows are of one element"
        if rounds(spec) and not numbered(plan):
            return "its elements' numbers are not regular"
        if spec.exp_avg == torch.int8 and inside[-1:] != (last,):
            return "its int8 runs are not inside the rows that are summed"
        return None

    # Copies of what compiled code cannot read as it lies in memory

    def _unreadable(self, work: ParamStep, lines: Lines) -> dict[str, str]:
        """What compiled code cannot read of a work, and why."""
        reasons = {}
        tensors = {"param": work.param, "grad": work.grad, "exp_avg": work.exp_avg}
        for key, tensor in tensors.items():
            if tensor is not None and lines.strides(tensor) is None:
                reasons[key] = "has dims that do not follow each other in memory"
            elif tensor is not None and work.exp_avg_scale is not None and not tensor.is_contiguous():
                reasons[key] = "is not contiguous, beside int8 momentum"
        if work.exp_avg_scale is not None and work.exp_avg.data_ptr() % 16:
            reasons["exp_avg"] = "begins at an odd address"  # it is read many elements at a time
        if work.exp_avg_scale is not None and not work.exp_avg_scale.is_contiguous():
            reasons["exp_avg_scale"] = "is not contiguous"
        if work.grad is not None and work.grad.dtype not in self.dtypes:
            reasons["grad"] = f"is {work.grad.dtype}"
        grids: list[ParamStep | Factor] = [work, *work.factors]
        if not all(grid.exp_avg_sq.is_contiguous() for grid in grids):
            reasons["exp_avg_sq"] = "is not contiguous"
        sums = [grid.sums for grid in grids if not grid.plan.of_columns]  # those of columns are float64
        if wide := [one.dtype for one in sums if one is not None and one.dtype != work.exp_avg_sq.dtype]:
            reasons["sums"] = f"travel as {wide[0]}"
        return reasons

    def _batches(self, works: Sequence[ParamStep]) -> Iterator[list[tuple[ParamStep, ParamStep]]]:
        """All works, a few at a time, and what compiled code takes in the place of each: itself, or a copy."""
        direct = [(work, work) for work in works if work.note is not None and not work.note.copied]
        if direct:
            yield direct
        batch, size = [], 0
        for work in works if len(direct) < len(works) else ():
            if work.note is not None and work.note.copied:
                batch.append((work, self._readable(work, work.note.copied)))
                size += work.param.numel()
                if size >= COPIED:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _readable(self, work: ParamStep, copied: Sequence[str]) -> ParamStep:
        """A work with readable copies of the tensors named."""
        kind = work.exp_avg_sq.dtype
        new: dict[str, Any] = {key: _contiguous(getattr(work, key)) for key in copied if key not in ("grad", "sums")}
        if "grad" in copied:
            assert work.grad is not None
            new["grad"] = _contiguous(work.grad, None if work.grad.dtype in self.dtypes else kind)
        factors = list(work.factors)
        if "exp_avg_sq" in copied:
            factors = [replace(factor, exp_avg_sq=_contiguous(factor.exp_avg_sq)) for factor in factors]
        if "sums" in copied:
            if work.own_sums is not None and not work.by_columns:
                new["own_sums"] = torch.zeros_like(work.own_sums, dtype=kind)
            if work.sums is not None and not work.plan.of_columns:
                new["sums"] = work.sums.to(kind)
            factors = [
                factor if factor.plan.of_columns or factor.sums is None else replace(factor, sums=factor.sums.to(kind))
                for factor in factors
            ]
        copy = replace(work, **new, factors=tuple(factors), note=None)
        self.check([copy])
        assert copy.note is not None
        copy.note.copied = ()
        return copy

    def _by_dtypes(self, kind: str, works: Sequence[ParamStep]) -> Iterable[tuple[Table, list[ParamStep]]]:
        """The works with their tables, one per device and combination of dtypes; addresses are up to date."""
        alike: dict[tuple[Any, ...], list[ParamStep]] = {}
        for work in works:
            assert work.note is not None
            alike.setdefault(work.note.kind, []).append(work)
        for own, members in alike.items():
            key = (kind, *own, *(work.name for work in members))
            table = self._tables.get(key)
            if table is None:
                if len(self._tables) >= TABLES:  # where gradients come and go
                    del self._tables[next(iter(self._tables))]
                table = self._tables[key] = Table(members, [self._line(work) for work in members])
            else:
                table.refresh(members)
            yield table, members


def _contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, in memory of its own."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device).copy_(tensor)


def _copy_back(work: ParamStep, copy: ParamStep) -> None:
    """Put what an update has changed from a copy into the tensors it was made of."""
    pairs = [(work.param, copy.param), (work.exp_avg, copy.exp_avg), (work.exp_avg_scale, copy.exp_avg_scale)]
    pairs.append((work.exp_avg_sq, copy.exp_avg_sq))
    pairs += [(a.exp_avg_sq, b.exp_avg_sq) for a, b in zip(work.factors, copy.factors, strict=True)]
    for target, source in pairs:
        if target is not None and source is not None and target is not source:
            target.copy_(source)
