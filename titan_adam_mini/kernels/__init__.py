"""The arithmetic of a step on local tensors: one file per engine behind one signature.

    reference   "for-loop": block by block, the slow truth
    vectorized  "foreach": whole-tensor torch operations, on any device
    cpu         "fused" on a CPU: compiled loops, all tensors in one go
    triton      "fused" on a GPU: all tensors in a constant number of launches

What they share for second moments of columns, which FSDP cuts between rows, is in `columns`.

An engine takes plain local tensors together with their plan, and talks to nobody. Every engine owns its order of
summation: it depends on the block alone, never on how many blocks or rows a rank holds, so that any sharding adds in
the order of a single device.
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
"""Stands for a tensor between steps."""


@dataclass(frozen=True)
class Spec:
    """What decides how an engine serves a parameter: the same on every rank that has a part of it.

    Nothing that a rank may have for itself belongs here: no strides, no addresses, no gradients.

    Attributes:
        plans: its blocks, one plan per grid; of the shard, only how the mesh cuts is looked at.
        device: type of the device.
        param, exp_avg, exp_avg_sq: dtypes of the parameter, its momentum and its second moments.
        rounds: are its values rounded at random?
    """

    plans: tuple[BlockPlan, ...]
    device: str
    param: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    rounds: bool = False


@dataclass
class Factor:
    """A further grid of a factored second moment, of its columns or of the whole; see the same names of `ParamStep`."""

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
        grad: the gradient, of the shape of `param`; None if this rank has none: only what all ranks share moves on.
        exp_avg: the momentum, of the shape of `param`, in any floating dtype or int8; updated in place.
        exp_avg_scale: for int8 momentum, one float32 per run of columns (see `kernels.int8`); else None.
        exp_avg_sq: [plan.grid_shape] float32 or float64, in which all is computed; updated in place.
        step: 0-d float32, the number of steps; updated in place.
        group: torch's parameter group: lr, betas, eps, weight_decay, maximize.
        decay: does weight decay apply?
        seed: of the random rounding of bfloat16 parameters; None rounds to nearest.
        own_sums: [plan.sums_shape] where this rank's sums of squares go; None if nothing straddles.
        sums: [plan.sums_shape] where they are found when all ranks have added theirs; None if nothing straddles.
        present: 0-d, how many ranks have a gradient; what a rank without one goes by. None if nobody else has any.
        factors: of a factored second moment, whose first grid is that of its rows: the columns, whose sums are
            float64, and the whole. Else nothing.
        spec: what was planned for it; taken from the tensors if it is not given.
        squares: where `by_columns`, once they are known in a step: per box that this rank owns the sums of squares of
            its rows, [..., rows, 1] (only if there are factors), and of its columns, float64 [..., 1, columns].
        note: what `check` last found the tensors to be.
        checked: has it done so in this step?
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
        """Have columns of a matrix second moments, alone or beside its rows? See `kernels.columns`."""
        return bool(self.factors) or self.plan.of_columns

    def release(self) -> None:
        """Let go of the tensors of a step: whoever drops gradients, or moves state away, wants the memory back."""
        self.param = self.exp_avg = self.exp_avg_sq = self.step = NOTHING
        self.grad = self.exp_avg_scale = self.squares = None
        self.checked = False
        for factor in self.factors:
            factor.exp_avg_sq = NOTHING

    @property
    def waits(self) -> bool:
        """Are there sums that other ranks add to?"""
        return self.sums is not None or any(factor.sums is not None for factor in self.factors)


class Engine(Protocol):
    """What all engines have in common. An engine serves one plan of one optimizer and may keep tables between steps."""

    name: str
    """What the log calls it."""

    version: str
    """Its name and the versions of all that its results may depend on: the same on all ranks."""

    step_on_device: bool
    """Whether `step` lives where the parameter does; on the CPU otherwise."""

    def fallback(self, spec: Spec) -> str | None:
        """Why a parameter is left to a slower engine; None if it is not. Known before the first step, and for good."""

    def check(self, works: Sequence[ParamStep]) -> None:
        """Compare all tensors of a step with what was planned, before anything is changed.

        Raises ValueError, naming parameter and tensor, for one that has another shape, dtype or device, or whose
        memory was released.
        """

    def square_sums(self, works: Sequence[ParamStep]) -> None:
        """Write this rank's sums of squares into every work's zeroed `own_sums`, those of its factors too."""

    def update(self, works: Sequence[ParamStep]) -> None:
        """One step of Adam-mini for every work (arXiv 2406.16793, Algorithm 1), everything in place."""


def choose(foreach: bool | None, fused: bool | None, capturable: bool, device: torch.device) -> tuple[Engine, str]:
    """The engine that torch's `foreach` and `fused` flags ask for on `device`, and a line that says which and why.

    `fused`, and neither flag, ask for the fast engine of the device; what cannot run falls back one step and says so.
    Raises ValueError if `capturable` is asked for and the engine does not serve it.
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
            f"capturable=True needs the fused engine on CUDA, and this is {line} on {device.type!r}; leave foreach and "
            "capturable out"
        )
    return engine, line
