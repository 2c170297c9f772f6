"""The arithmetic of a step on local tensors: one file per engine behind one signature.

    reference   "for-loop": block by block, slow; the other engines are tested against it
    vectorized  "foreach": whole-tensor torch operations, on any device
    cpu         "fused" on a CPU: compiled loops over all tensors in one call
    triton      "fused" on a GPU: all tensors in a constant number of launches

`columns` has the shared code for second moments of columns, which FSDP cuts between rows.

An engine takes plain local tensors together with their plan, and does not communicate. Its order of summation depends
on the block alone, never on how many blocks or rows a rank has, so that any sharding sums in the order of a single
device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..plan import BlockPlan

if TYPE_CHECKING:
    from .check import Note

log = logging.getLogger("titan_adam_mini")

NOTHING = torch.empty(0)
"""Placeholder for a tensor between steps."""


@dataclass(frozen=True)
class Spec:
    """What determines how an engine updates a parameter: the same on every rank that has a part of it.

    Contains nothing that may differ between ranks, such as strides, addresses or gradients.

    Attributes:
        plans: its blocks, one plan per grid; of the shard, only the cuts of the mesh are used.
        device: type of the device.
        param, exp_avg, exp_avg_sq: dtypes of the parameter, its momentum and its second moments.
        rounds: whether its values are rounded stochastically.
    """

    plans: tuple[BlockPlan, ...]
    device: str
    param: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    rounds: bool = False


@dataclass
class Factor:
    """A further grid of a factored second moment: columns, or the full matrix. Attributes as in `ParamStep`."""

    plan: BlockPlan
    exp_avg_sq: Tensor
    own_sums: Tensor | None = None
    sums: Tensor | None = None


@dataclass
class ParamStep:
    """One parameter in one step: plain tensors with this rank's data.

    Attributes:
        name: the parameter's, unique in its optimizer.
        plan: its blocks on this rank.
        param: the values; updated in place.
        grad: the gradient, of the shape of `param`; None if this rank has none: only state shared by all ranks changes.
        exp_avg: the momentum, of the shape of `param`, in any floating dtype or int8; updated in place.
        exp_avg_scale: for int8 momentum, one float32 per run of columns (see `kernels.int8`); else None.
        exp_avg_sq: [plan.grid_shape], float32 or float64, the dtype of all arithmetic; updated in place.
        step: 0-d float32, the number of steps; updated in place.
        group: torch's parameter group: lr, betas, eps, weight_decay, maximize.
        decay: whether weight decay applies.
        seed: for stochastic rounding of bfloat16 parameters; None rounds to nearest.
        own_sums: [plan.sums_shape], this rank's sums of squares; None if nothing straddles.
        sums: [plan.sums_shape], the sums over all ranks, after the exchange; None if nothing straddles.
        present: 0-d, the number of ranks that have a gradient; None if no other rank has a part.
        factors: of a factored second moment, whose first grid is that of its rows: the columns, whose sums are
            float64, and the full matrix. Empty otherwise.
        spec: what was planned for it; taken from the tensors if it is not given.
        squares: with `by_columns`, once they are computed in a step: per box that this rank owns the sums of squares of
            its rows, [..., rows, 1] (only if there are factors), and of its columns, float64 [..., 1, columns].
        note: the tensors' properties when `check` last examined them.
        checked: whether it has done so in this step.
    """

    name: str
    plan: BlockPlan
    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq: Tensor
    step: Tensor
    group: Mapping[str, Any]
    decay: bool
    seed: int | None = None
    own_sums: Tensor | None = None
    sums: Tensor | None = None
    present: Tensor | None = None
    factors: tuple[Factor, ...] = ()
    spec: Spec | None = None
    squares: list[tuple[Tensor, Tensor]] | None = None
    note: Note | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        if self.spec is None:
            plans = (self.plan, *(factor.plan for factor in self.factors))
            dtypes = (self.param.dtype, self.exp_avg.dtype, self.exp_avg_sq.dtype)
            self.spec = Spec(plans, self.param.device.type, *dtypes, self.seed is not None)

    @cached_property
    def by_columns(self) -> bool:
        """Whether columns of a matrix have second moments, alone or beside its rows; see `kernels.columns`."""
        return bool(self.factors) or self.plan.of_columns

    def release(self) -> None:
        """Drop the references to a step's tensors, so that cleared gradients and offloaded state are freed."""
        self.param = self.exp_avg = self.exp_avg_sq = self.step = NOTHING
        self.grad = self.exp_avg_scale = self.squares = None
        self.checked = False
        for factor in self.factors:
            factor.exp_avg_sq = NOTHING

    @property
    def waits(self) -> bool:
        """Whether its update needs sums from other ranks."""
        return self.sums is not None or any(factor.sums is not None for factor in self.factors)


class Engine(Protocol):
    """The interface of engines. An engine belongs to one plan of one optimizer and may keep tables between steps."""

    name: str
    """Its name in the log."""

    version: str
    """Its name and the versions of all libraries that its results may depend on; the same on all ranks."""

    step_on_device: bool
    """Whether `step` is on the parameter's device; on the CPU otherwise."""

    def fallback(self, spec: Spec) -> str | None:
        """Why a parameter falls back to a slower engine, or None. Known before the first step; never changes."""

    def check(self, param_steps: Sequence[ParamStep]) -> None:
        """Compare all tensors of a step with the plan, before anything is changed.

        Raises ValueError, naming parameter and tensor, for one that has another shape, dtype or device, or whose
        memory was released.
        """

    def square_sums(self, param_steps: Sequence[ParamStep]) -> None:
        """Write this rank's sums of squares into the zeroed `own_sums` of every parameter and of its factors."""

    def update(self, param_steps: Sequence[ParamStep]) -> None:
        """One step of Adam-mini for every parameter (arXiv 2406.16793, Algorithm 1), everything in place."""


def choose(foreach: bool | None, fused: bool | None, capturable: bool, device: torch.device) -> tuple[Engine, str]:
    """The engine selected by torch's `foreach` and `fused` flags on `device`, and a line for the log with the reason.

    `fused`, or neither flag, selects the fast engine of the device; if it cannot run, "foreach" is used and the line
    gives the reason. Raises ValueError if `capturable` is set and the engine does not support it.
    """
    from . import reference, vectorized
    from .tensorwise import Tensorwise

    plain = Tensorwise("foreach", vectorized)
    engine: Engine = plain
    line = "foreach (vectorized torch)"
    if foreach is False and not fused:
        engine, line = Tensorwise("for-loop", reference), "for-loop (block by block: the slow reference)"
    elif not foreach:
        try:
            if device.type == "cpu":
                from .cpu import CpuEngine

                engine, line = CpuEngine(plain), "fused (compiled CPU loops)"
            elif device.type == "cuda":
                from .triton import TritonEngine

                engine, line = TritonEngine(plain), "fused (Triton)"
            else:
                line += f"; not fused: there is no fused engine for {device.type!r} tensors"
        except ImportError as error:
            line += f"; not fused: {error.name} cannot be imported ({error})"
    if capturable and device.type != "meta" and (device.type != "cuda" or isinstance(engine, Tensorwise)):
        raise ValueError(
            f"capturable=True needs the fused engine on CUDA, but this is {line} on {device.type!r}; leave foreach and "
            "capturable out"
        )
    return engine, line
