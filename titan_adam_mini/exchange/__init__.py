"""All communication of a step: reduces Partial gradients, sums straddling blocks, and checks the plan at the start.

`local_sums -> all_reduce -> finish`. Per process group and step there is at most one all-reduce for Partial
gradients and one for the sums, none if nothing is Partial or straddles. Everything else in the package is local.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import NOTHING, Engine, Factor, ParamStep, rounding
from ..partition import clean_name
from ..plan import BufferPlan, Group, bytes_in, grids_of, plan_buffers
from ..sharding import local
from .buffer import Buffer
from .gradients import Gradients
from .item import Item, channels_of, mesh_axes

__all__ = ["Exchange", "Item", "bytes_exchanged", "mesh_axes"]


class Exchange:
    """The communication of one optimizer on one rank. Building it is collective: it checks the plan."""

    def __init__(self, items: Sequence[Item]) -> None:
        """Plan the exchange of `items` and check it with all ranks of every group.

        Raises ValueError on all ranks of a group whose plans differ.
        """
        self.items = list(items)
        axes = [item.axes for item in self.items]
        self.grids = grids_of([item.plans for item in self.items])
        self._grids_of: list[list[int]] = [[] for _ in self.items]
        for number, grid in enumerate(self.grids):
            self._grids_of[grid.param].append(number)
        self.buffers = plan_buffers(self.grids, axes)
        self.channels = channels_of(self.items)
        self._check_plans()
        self._buffers: list[Buffer] = []
        for plan in self.buffers:
            members = [self.items[self.grids[slot.grid].param] for slot in plan.slots]
            wide = any(item.dtype == torch.float64 for item in members)
            device = local(members[0].param).device
            data = torch.empty(plan.numel, dtype=torch.float64 if wide else torch.float32, device=device)
            self._buffers.append(Buffer(plan, data, self.channels[plan.group]))
        for buffer in self._buffers:
            buffer.chain(self._buffers, self.grids)
        self._gradients = Gradients(self.items, self.channels)

    @property
    def straddling(self) -> list[int]:
        """Indices of the parameters whose blocks straddle."""
        return [index for index, item in enumerate(self.items) if item.straddles]

    def _check_plans(self) -> None:
        """Compare, for every group, a hash of everything on which its ranks must agree."""
        rows: dict[Group, list[object]] = {group: [] for group in self.channels}
        for item in self.items:
            place = str(getattr(item.param, "placements", ""))
            for axis in item.axes:
                grids = [(str(plan.layout), plan.keep) for plan in item.plans]
                rows[axis.ranks].append((item.name, grids, place, str(item.dtype), item.agreed, item.served))
        for buffer in self.buffers:
            rows[buffer.group].append(buffer)
        wrong = []
        for group, channel in self.channels.items():
            digest = int.from_bytes(hashlib.blake2b(repr(rows[group]).encode(), digest_size=7).digest(), "big")
            extremes = channel.max([digest, -digest])
            if extremes[0] != -extremes[1]:
                wrong.append(group)
        if wrong:
            raise ValueError(
                f"AdamMini's plans differ between ranks {', '.join(map(str, wrong))}: every rank of a group must pass "
                "the same parameters, names, roles, placements, head counts, momentum dtypes and rounding, in the same "
                "order, and must use the same engine: the same versions of torch, and of numba or Triton, on all ranks "
                f"(this rank: {self._engines()})"
            )

    def _engines(self) -> str:
        """The engines of this rank's parameters, and the reasons for fallbacks."""
        return "; ".join(dict.fromkeys(part for item in self.items for part in item.served if part)) or "none"

    def gradients(self) -> list[Tensor | None]:
        """This rank's local gradients, Partial ones completed; see `Gradients.take`. Collective."""
        return self._gradients.take()

    # Sums of squares

    def param_steps(
        self, groups: Mapping[int, Mapping[str, Any]], decay: Mapping[str, bool], seed: int | None
    ) -> list[ParamStep]:
        """One `ParamStep` per parameter, without the tensors of a step.

        Args:
            groups: id of a parameter -> its group.
            decay: name -> whether weight decay applies.
            seed: for stochastic rounding; None rounds to nearest.
        """
        param_steps = []
        for index, item in enumerate(self.items):
            ((own, complete), *others), present = self._places(index)
            plan, *more = item.plans
            param_steps.append(
                ParamStep(
                    name=item.name,
                    plan=plan,
                    param=NOTHING,
                    grad=None,
                    exp_avg=NOTHING,
                    exp_avg_scale=None,
                    exp_avg_sq=NOTHING,
                    step=NOTHING,
                    group=groups[id(item.param)],
                    decay=decay[item.name],
                    seed=None if seed is None else rounding.seed_of(seed, clean_name(item.name)),
                    own_sums=own,
                    sums=complete,
                    present=present,
                    spec=item.spec,
                    factors=tuple(Factor(factor, NOTHING, *sums) for factor, sums in zip(more, others, strict=True)),
                )
            )
        return param_steps

    def _places(self, index: int) -> tuple[list[tuple[Tensor | None, Tensor | None]], Tensor | None]:
        """Views of one parameter's entries in the buffers: per grid, this rank's own sums before the exchange and all
        ranks' sums after it (both of the plan's `sums_shape`), and the number of ranks that have a gradient, 0-d. None
        for what is not exchanged.
        """
        sums: list[tuple[Tensor | None, Tensor | None]] = []
        present = None
        for number in self._grids_of[index]:
            own = complete = None
            for buffer in self._buffers:
                slot = buffer.slots.get(number)
                if slot is None:
                    continue
                present = buffer.data[slot.present]
                if slot.sums is not None:
                    shape = self.grids[number].plan.sums_shape
                    part = buffer.float64_sums if slot.float64 else buffer.data
                    complete = part[slot.sums : slot.sums + math.prod(shape)].view(shape)
                    own = complete if slot.after is None else own
            sums.append((own, complete))
        return sums, present

    def start(self, param_steps: Sequence[ParamStep], engine: Engine) -> None:
        """Compute this rank's sums of the straddling blocks and start the all-reduces; one `ParamStep` per item."""
        for buffer in self._buffers:
            buffer.clear([param_steps[self.grids[index].param].grad is not None for index in buffer.slots])
        engine.square_sums(
            [
                param_step
                for param_step in param_steps
                if param_step.waits and param_step.grad is not None and param_step.grad.numel()
            ]
        )
        for buffer in self._buffers:
            for number, float64, source, target, length in buffer.chained:
                earlier = self._buffers[number]
                earlier.wait()
                into, out = (buffer.float64_sums, earlier.float64_sums) if float64 else (buffer.data, earlier.data)
                into[target : target + length] = out[source : source + length]
            buffer.send()

    def finish(self) -> None:
        """Wait until every buffer has the sums of all ranks."""
        for buffer in self._buffers:
            buffer.wait()


def bytes_exchanged(items: Sequence[Item], buffers: Sequence[BufferPlan]) -> dict[int, int]:
    """Bytes per step that each straddling parameter exchanges, presence slots included."""
    return bytes_in(buffers, grids_of([item.plans for item in items]), [item.dtype.itemsize for item in items])
