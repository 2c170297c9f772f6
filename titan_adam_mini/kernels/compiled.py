"""Shared code of the two compiled engines: tables of parameters for compiled code, copies, and fallbacks to torch.

Which engine updates a parameter depends only on facts shared by all ranks (see `Spec`), so that its sums are added in
the same order everywhere. If compiled code cannot read the memory layout of this rank's tensors, it works on copies.
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
"""Tables cached: one per call and combination of dtypes, and per pattern of missing gradients."""
COPIED = 1 << 24
"""Number of elements after which a batch of parameters that are updated as copies ends."""


class Compiled:
    """An engine (see `kernels.Engine`) that runs compiled code on tables; `plain` updates the rest, logged once."""

    name = "fused"
    version = "fused"
    device_type = ""
    step_on_device = False
    precisions: tuple[torch.dtype, ...] = (torch.float32,)
    """Dtypes of second moments, in which the engine computes."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Dtypes of parameters, gradients and momentum that it reads, besides int8 momentum."""

    def __init__(self, plain: Tensorwise) -> None:
        self.plain = plain
        self._lines: dict[str, Lines] = {}
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._fallbacks: dict[str, str] = {}
        self._copied: dict[str, str] = {}

    def run_sums(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """Write sums of squares into `own_sums`; all parameters have the same dtypes."""
        raise NotImplementedError

    def run_update(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """One step; all parameters have the same dtypes, and all or none have a gradient or are by columns."""
        raise NotImplementedError

    def run_squares(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """Write sums of squares of columns, and of lines if `table.factored`, into `table.squares`."""
        raise NotImplementedError

    def run_moments(self, table: Table, param_steps: Sequence[ParamStep]) -> None:
        """Advance the second moments of parameters by columns, and write their roots into `table.roots`."""
        for param_step, (of_rows, of_columns) in zip(param_steps, table.roots, strict=True):
            self.plain.advance(param_step)
            if not param_step.param.numel():
                continue
            step = param_step.step.to(torch.float64) + 1
            ((rows, here),) = columns.roots(param_step, 1 - param_step.group["betas"][1] ** step)
            of_rows.copy_(rows)
            of_columns.copy_(here)

    def check(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.check`."""
        check(param_steps, self.step_on_device)

    def square_sums(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.square_sums`."""
        mine, rest = self._split(param_steps)
        self.plain.square_sums(rest)
        for batch in self._batches(mine):
            self._square_sums([copy for _, copy in batch])
            for param_step, copy in batch:
                param_step.squares = copy.squares
                if param_step.own_sums is not None and copy.own_sums is not param_step.own_sums:
                    param_step.own_sums.copy_(copy.own_sums)

    def _square_sums(self, param_steps: Sequence[ParamStep]) -> None:
        self.plain.square_sums(
            [param_step for param_step in param_steps if not (param_step.by_columns or self._line(param_step).summable)]
        )
        matrices = [param_step for param_step in param_steps if param_step.by_columns]
        self._compute_squares(matrices)
        columns.add_to_exchange(matrices)
        alone = [
            param_step for param_step in param_steps if not param_step.by_columns and self._line(param_step).summable
        ]
        for table, members in self._by_dtypes("sums", alone):
            self.run_sums(table, members)

    def update(self, param_steps: Sequence[ParamStep]) -> None:
        """See `Engine.update`."""
        mine, rest = self._split(param_steps)
        # Unsharded parameters, or columns, with a gradient on other ranks but not here: rare, so speed does not matter.
        idle = [
            param_step
            for param_step in mine
            if param_step.grad is None and (param_step.sums is None or param_step.by_columns)
        ]
        mine = [
            param_step
            for param_step in mine
            if param_step.grad is not None or (param_step.sums is not None and not param_step.by_columns)
        ]
        self.plain.update(rest + idle)
        for batch in self._batches(mine):
            here = [copy for _, copy in batch]
            self._update_by_columns([param_step for param_step in here if param_step.by_columns])
            for table, members in self._by_dtypes(
                "update", [param_step for param_step in here if not param_step.by_columns]
            ):
                self.run_update(table, members)
            for param_step, copy in batch:
                if copy is not param_step:
                    _copy_back(param_step, copy)
        for param_step in param_steps:
            param_step.checked = False

    def _compute_squares(self, param_steps: Sequence[ParamStep]) -> None:
        """`columns.compute_squares` for all parameters."""
        for table, members in self._by_columns(param_steps):
            for param_step, squares in zip(members, table.squares, strict=True):
                param_step.squares = [squares]
            self.run_squares(table, members)

    def _update_by_columns(self, param_steps: Sequence[ParamStep]) -> None:
        self._compute_squares([param_step for param_step in param_steps if param_step.squares is None])
        for table, members in self._by_columns(param_steps):
            self.run_moments(table, members)
            self.run_update(table, members)

    def _by_columns(self, param_steps: Sequence[ParamStep]) -> Iterable[tuple[Table, list[ParamStep]]]:
        for kind, factored in (("columns", False), ("factored", True)):
            yield from self._by_dtypes(
                kind, [param_step for param_step in param_steps if bool(param_step.factors) == factored]
            )

    def _line(self, param_step: ParamStep) -> Lines:
        return self._lines[param_step.name]

    def _split(self, param_steps: Sequence[ParamStep]) -> tuple[list[ParamStep], list[ParamStep]]:
        """Parameters for compiled code, and those that fall back to torch; all are checked, with complete notes."""
        if unchecked := [param_step for param_step in param_steps if not param_step.checked]:
            self.check(unchecked)
        mine: list[ParamStep] = []
        rest: list[ParamStep] = []
        left: dict[str, str] = {}
        copied: dict[str, str] = {}
        for param_step in param_steps:
            name, note = param_step.name, param_step.note
            assert note is not None and param_step.spec is not None
            if name not in self._lines and name not in self._fallbacks:
                reason = self.fallback(param_step.spec)
                if reason is not None:
                    self._fallbacks[name] = left[name] = reason
                else:
                    lines = lines_of(param_step.plan.of_rows if param_step.plan.of_columns else param_step.plan)
                    assert isinstance(lines, Lines), lines
                    self._lines[name] = lines
            if name in self._fallbacks:
                rest.append(param_step)
                continue
            if note.copied is None:
                reasons = self._unreadable(param_step, self._lines[name])
                note.copied = tuple(reasons)
                if reasons and name not in self._copied:
                    self._copied[name] = copied[name] = "; ".join(f"{key} {why}" for key, why in reasons.items())
            mine.append(param_step)
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
        unknown = [str(dtype) for dtype in (spec.param, spec.exp_avg) if dtype not in (*self.dtypes, torch.int8)]
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
            return "its elements have no regular numbering"
        if spec.exp_avg == torch.int8 and inside[-1:] != (last,):
            return "its int8 runs do not lie inside the rows that are summed"
        return None

    # Copies of tensors whose memory layout compiled code cannot read

    def _unreadable(self, param_step: ParamStep, lines: Lines) -> dict[str, str]:
        """The tensors of a parameter that compiled code cannot read, and why."""
        reasons = {}
        tensors = {"param": param_step.param, "grad": param_step.grad, "exp_avg": param_step.exp_avg}
        for key, tensor in tensors.items():
            if tensor is not None and lines.strides(tensor) is None:
                reasons[key] = "has dims that are not adjacent in memory"
            elif tensor is not None and param_step.exp_avg_scale is not None and not tensor.is_contiguous():
                reasons[key] = "is not contiguous, beside int8 momentum"
        if param_step.exp_avg_scale is not None and param_step.exp_avg.data_ptr() % 16:
            reasons["exp_avg"] = "is not aligned to 16 bytes"  # it is read many elements at a time
        if param_step.exp_avg_scale is not None and not param_step.exp_avg_scale.is_contiguous():
            reasons["exp_avg_scale"] = "is not contiguous"
        if param_step.grad is not None and param_step.grad.dtype not in self.dtypes:
            reasons["grad"] = f"is {param_step.grad.dtype}"
        grids: list[ParamStep | Factor] = [param_step, *param_step.factors]
        if not all(grid.exp_avg_sq.is_contiguous() for grid in grids):
            reasons["exp_avg_sq"] = "is not contiguous"
        sums = [grid.sums for grid in grids if not grid.plan.of_columns]  # those of columns are float64
        if wide := [
            tensor.dtype for tensor in sums if tensor is not None and tensor.dtype != param_step.exp_avg_sq.dtype
        ]:
            reasons["sums"] = f"are exchanged as {wide[0]}"
        return reasons

    def _batches(self, param_steps: Sequence[ParamStep]) -> Iterator[list[tuple[ParamStep, ParamStep]]]:
        """Batches of (parameter, what compiled code updates instead: itself or a readable copy)."""
        direct = [
            (param_step, param_step)
            for param_step in param_steps
            if param_step.note is not None and not param_step.note.copied
        ]
        if direct:
            yield direct
        batch, size = [], 0
        for param_step in param_steps if len(direct) < len(param_steps) else ():
            if param_step.note is not None and param_step.note.copied:
                batch.append((param_step, self._readable(param_step, param_step.note.copied)))
                size += param_step.param.numel()
                if size >= COPIED:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _readable(self, param_step: ParamStep, copied: Sequence[str]) -> ParamStep:
        """The parameter with readable copies of the named tensors."""
        kind = param_step.exp_avg_sq.dtype
        new: dict[str, Any] = {
            key: _contiguous(getattr(param_step, key)) for key in copied if key not in ("grad", "sums")
        }
        if "grad" in copied:
            assert param_step.grad is not None
            new["grad"] = _contiguous(param_step.grad, None if param_step.grad.dtype in self.dtypes else kind)
        factors = list(param_step.factors)
        if "exp_avg_sq" in copied:
            factors = [replace(factor, exp_avg_sq=_contiguous(factor.exp_avg_sq)) for factor in factors]
        if "sums" in copied:
            if param_step.own_sums is not None and not param_step.by_columns:
                new["own_sums"] = torch.zeros_like(param_step.own_sums, dtype=kind)
            if param_step.sums is not None and not param_step.plan.of_columns:
                new["sums"] = param_step.sums.to(kind)
            factors = [
                factor if factor.plan.of_columns or factor.sums is None else replace(factor, sums=factor.sums.to(kind))
                for factor in factors
            ]
        copy = replace(param_step, **new, factors=tuple(factors), note=None)
        self.check([copy])
        assert copy.note is not None
        copy.note.copied = ()
        return copy

    def _by_dtypes(self, kind: str, param_steps: Sequence[ParamStep]) -> Iterable[tuple[Table, list[ParamStep]]]:
        """Tables with up-to-date addresses and their parameters, one per device and combination of dtypes."""
        by_kind: dict[tuple[Any, ...], list[ParamStep]] = {}
        for param_step in param_steps:
            assert param_step.note is not None
            by_kind.setdefault(param_step.note.kind, []).append(param_step)
        for own, members in by_kind.items():
            key = (kind, *own, *(param_step.name for param_step in members))
            table = self._tables.get(key)
            if table is None:
                if len(self._tables) >= TABLES:  # where gradients come and go
                    del self._tables[next(iter(self._tables))]
                table = self._tables[key] = Table(members, [self._line(param_step) for param_step in members])
            else:
                table.refresh(members)
            yield table, members


def _contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy in new memory."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device).copy_(tensor)


def _copy_back(param_step: ParamStep, copy: ParamStep) -> None:
    """Copy what an update has changed back into the original tensors."""
    pairs = [
        (param_step.param, copy.param),
        (param_step.exp_avg, copy.exp_avg),
        (param_step.exp_avg_scale, copy.exp_avg_scale),
    ]
    pairs.append((param_step.exp_avg_sq, copy.exp_avg_sq))
    pairs += [(a.exp_avg_sq, b.exp_avg_sq) for a, b in zip(param_step.factors, copy.factors, strict=True)]
    for target, source in pairs:
        if target is not None and source is not None and target is not source:
            target.copy_(source)
