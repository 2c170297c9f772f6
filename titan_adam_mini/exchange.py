"""All communication of a step: Partial gradients completed, straddling blocks summed, the plan checked at the start.

`local_sums -> all_reduce -> finish`. Per process group and step there is at most one all-reduce for Partial
gradients and one for the sums, none where nothing is Partial or straddles. Everything else in the package is local.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor, Partial, Replicate

from .kernels import Engine, ParamStep, Spec
from .plan import BlockPlan, BufferPlan, Grid, Group, bytes_in, grids_of, ordered_groups, plan_buffers
from .sharding import Axis, axes_of, local, local_gradient

MISSING, COMPLETE, PARTIAL = 0, 1, 2
"""What is known of a gradient on a mesh axis; the largest that any rank knows holds for all."""


@dataclass
class Item:
    """A parameter as the exchange sees it.

    Attributes:
        name: its name, for messages.
        param: the parameter itself (a DTensor or a plain tensor).
        plans: its blocks on this rank, one plan per grid.
        axes: the axes, of more than one rank, of its mesh.
        dtype: dtype of its sums and second moments.
        agreed: what else must be the same on every rank that has a part of it.
        spec: what its engine decides by.
        served: the engine with its versions, and why it leaves this parameter to a slower one; the same on all ranks.
    """

    name: str
    param: Tensor
    plans: tuple[BlockPlan, ...]
    axes: tuple[Axis, ...]
    dtype: torch.dtype
    agreed: object = None
    spec: Spec | None = None
    served: tuple[str, str | None] = ("", None)

    @property
    def straddles(self) -> bool:
        """Are there blocks on more than one rank?"""
        return any(plan.axes for plan in self.plans)


def mesh_axes(param: Tensor) -> tuple[Axis, ...]:
    """The axes, of more than one rank, of the mesh that a parameter lives on."""
    return axes_of(param.device_mesh) if isinstance(param, DTensor) else ()


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
        self.groups = {group: self._process_group(group) for group in ordered_groups(axes)}
        self._check_plans()
        self._buffers: list[_Buffer] = []
        for plan in self.buffers:
            members = [self.items[self.grids[slot.grid].param] for slot in plan.slots]
            wide = any(item.dtype == torch.float64 for item in members)
            home = local(members[0].param).device
            data = torch.empty(plan.numel, dtype=torch.float64 if wide else torch.float32, device=home)
            self._buffers.append(_Buffer(plan, data, self.groups[plan.group], self._device(plan.group)))
        for buffer in self._buffers:
            buffer.chain(self._buffers, self.grids)
        self._specs: list[Any] = [None for _ in self.items]
        self._partial: dict[Group, list[tuple[int, int]]] | None = None

    @property
    def straddling(self) -> list[int]:
        """Indices of the parameters whose blocks straddle."""
        return [index for index, item in enumerate(self.items) if item.straddles]

    # Start-up

    def _process_group(self, group: Group) -> dist.ProcessGroup:
        for item in self.items:
            for axis in item.axes:
                if axis.ranks == group:
                    assert isinstance(item.param, DTensor)
                    return item.param.device_mesh.get_group(axis.index)
        raise AssertionError(f"no mesh has a group of ranks {group}")

    def _device(self, group: Group) -> torch.device:
        """Where a group's tensors must lie to be reduced: with the parameters if it can, else on the mesh's device."""
        item = next(item for item in self.items for axis in item.axes if axis.ranks == group)
        assert isinstance(item.param, DTensor)
        device = local(item.param).device
        if device.type == item.param.device_mesh.device_type or device.type == "meta":
            return device
        supported = {torch.device(one).type for one in self.groups[group]._device_types}
        return device if device.type in supported else torch.device(item.param.device_mesh.device_type)

    def _check_plans(self) -> None:
        """Compare, group by group, a hash of everything that the ranks of the group must agree on."""
        rows: dict[Group, list[object]] = {group: [] for group in self.groups}
        for item in self.items:
            place = str(getattr(item.param, "placements", ""))
            for axis in item.axes:
                grids = [(str(plan.layout), plan.keep) for plan in item.plans]
                rows[axis.ranks].append((item.name, grids, place, str(item.dtype), item.agreed, item.served))
        for buffer in self.buffers:
            rows[buffer.group].append(buffer)
        wrong = []
        for group in self.groups:
            digest = int.from_bytes(hashlib.blake2b(repr(rows[group]).encode(), digest_size=7).digest(), "big")
            extremes = self._reduce_max(group, [digest, -digest])
            if extremes[0] != -extremes[1]:
                wrong.append(group)
        if wrong:
            raise ValueError(
                f"AdamMini's plans differ between ranks {', '.join(map(str, wrong))}: every rank of a group must give "
                "the optimizer the same parameters, names, roles, placements, head counts, types of momentum and "
                "rounding, in the same order, and must compute with the same engine: the same versions of torch, and "
                f"of numba or Triton, installed everywhere (this rank: {self._engines()})"
            )

    def _engines(self) -> str:
        """The engine of this rank's parameters, and why some are left to a slower one, in words."""
        return "; ".join(dict.fromkeys(part for item in self.items for part in item.served if part)) or "none"

    def _reduce_max(self, group: Group, values: list[int]) -> list[int]:
        device = self._device(group)
        # A plan on the meta device, or of fake tensors, is made to be looked at: nothing is computed.
        if device.type == "meta" or active_fake_mode() is not None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.groups[group])
        return [int(value) for value in tensor.tolist()]

    # Gradients

    def gradients(self) -> list[Tensor | None]:
        """This rank's local gradients, Partial ones completed; None where there is none.

        Raises ValueError, naming the parameter, for a gradient that cannot update it.
        """
        grads: list[Tensor | None] = []
        unusual = []
        for index, item in enumerate(self.items):
            grad = item.param.grad
            if grad is None:
                grads.append(None)
            elif getattr(grad, "_spec", None) is self._specs[index] is not None:
                grads.append(local(grad))  # placed as the last one was, which was placed as its parameter is
            else:
                unusual.append(index)
                try:
                    grads.append(local_gradient(item.param, grad))
                except ValueError as error:
                    raise ValueError(f"AdamMini cannot use the gradient of {item.name!r}: {error}") from None
                if isinstance(grad, DTensor) and grad.placements == item.param.placements:
                    self._specs[index] = grad._spec
        if self._partial is None:
            self._partial = self._agree_on_partial()
        planned = {member for members in (self._partial or {}).values() for member in members}
        for index in unusual:
            item = self.items[index]
            for axis in item.axes:
                if self._known(index, axis) == PARTIAL and (index, axis.index) not in planned:
                    raise ValueError(
                        f"AdamMini cannot use the gradient of {item.name!r}: it is Partial on mesh axis {axis.index}, "
                        "but in the first step neither it nor another gradient of that axis was; make a new optimizer "
                        "when the gradients' placements change"
                    )
        for group, members in (self._partial or {}).items():
            self._complete(group, members, grads)
        return grads

    def _known(self, index: int, axis: Axis) -> int:
        grad = self.items[index].param.grad
        if grad is None:
            return MISSING
        assert isinstance(grad, DTensor)
        return PARTIAL if isinstance(grad.placements[axis.index], Partial) else COMPLETE

    def _agree_on_partial(self) -> dict[Group, list[tuple[int, int]]] | None:
        """Which gradients are Partial, group by group, as [(parameter, mesh axis)]; None until one gradient is seen.

        A parameter without a gradient on any rank joins those of its group that are Partial: should it get one
        later, it has its place.
        """
        candidates: dict[Group, list[tuple[int, Axis]]] = {}
        for index, item in enumerate(self.items):
            for axis in item.axes:
                assert isinstance(item.param, DTensor)
                if isinstance(item.param.placements[axis.index], Replicate):
                    candidates.setdefault(axis.ranks, []).append((index, axis))
        agreed: dict[Group, list[tuple[int, int]]] = {}
        seen = not candidates
        for group in self.groups:
            if group not in candidates:
                continue
            known = self._reduce_max(group, [self._known(*candidate) for candidate in candidates[group]])
            seen = seen or any(known)
            if PARTIAL in known:
                agreed[group] = [
                    (index, axis.index)
                    for (index, axis), state in zip(candidates[group], known, strict=True)
                    if state != COMPLETE
                ]
        return agreed if seen else None

    def _complete(self, group: Group, members: list[tuple[int, int]], grads: list[Tensor | None]) -> None:
        """Sum the Partial gradients of one group in one all-reduce; each has one more slot, the number of ranks."""
        numels = [local(self.items[index].param).numel() for index, _ in members]
        device = self._device(group)
        dtype = max((self.items[index].param.dtype for index, _ in members), key=lambda one: torch.finfo(one).bits)
        buffer = torch.zeros(sum(numels) + len(members), dtype=dtype, device=device)
        views = buffer[len(members) :].split(numels)
        partial = []
        for number, (index, axis) in enumerate(members):
            whole = self.items[index].param.grad
            placement = whole.placements[axis] if isinstance(whole, DTensor) else None
            partial.append(isinstance(placement, Partial))
            grad = grads[index]
            if partial[-1] and grad is not None:
                views[number].copy_(grad.reshape(-1))
                if isinstance(placement, Partial) and placement.reduce_op == "avg":
                    views[number].div_(len(group))
                buffer[number] = 1
        dist.all_reduce(buffer, group=self.groups[group])
        for number, (index, _) in enumerate(members):
            # A rank that has no gradient takes the sum of the others', so replicas stay replicas.
            if partial[number] or (grads[index] is None and buffer[number].item() > 0):
                data = local(self.items[index].param)
                grads[index] = views[number].view(data.shape).to(data.device)

    # Sums of squares

    def places(self, index: int) -> tuple[list[tuple[Tensor | None, Tensor | None]], Tensor | None]:
        """Where one parameter's numbers are in the buffers, which stay where they are: per grid, this rank's own sums
        before the exchange and all ranks' sums after it (both of the plan's `sums_shape`), and the number of ranks
        that have a gradient, 0-d. None for what is not exchanged.
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
                    part = buffer.fine if slot.fine else buffer.data
                    complete = part[slot.sums : slot.sums + math.prod(shape)].view(shape)
                    own = complete if slot.after is None else own
            sums.append((own, complete))
        return sums, present

    def start(self, works: Sequence[ParamStep], engine: Engine) -> None:
        """Compute this rank's sums of the straddling blocks and send them off; `works` has one for every item."""
        for buffer in self._buffers:
            buffer.clear([works[self.grids[index].param].grad is not None for index in buffer.slots])
        engine.square_sums([work for work in works if work.waits and work.grad is not None and work.grad.numel()])
        for buffer in self._buffers:
            for number, fine, source, target, length in buffer.chained:
                earlier = self._buffers[number]
                earlier.wait()
                into, out = (buffer.fine, earlier.fine) if fine else (buffer.data, earlier.data)
                into[target : target + length] = out[source : source + length]
            buffer.send()

    def finish(self) -> None:
        """Return once every buffer holds the sums of all ranks."""
        for buffer in self._buffers:
            buffer.wait()


class _Buffer:
    """One group's buffer; it is sent from another tensor where the group cannot reach its device, or where it has two
    parts, so that there is one all-reduce.

    Attributes:
        data: 1-D, what is exchanged.
        fine: 1-D float64, what is exchanged in that precision.
        slots: which grid stands where.
        chained: (number of another buffer, in its fine part?, offset there, offset here, length): what this one takes
            over, completed.
    """

    def __init__(self, plan: BufferPlan, data: Tensor, group: dist.ProcessGroup, device: torch.device) -> None:
        self.data = data
        self.fine = torch.empty(plan.fine_numel, dtype=torch.float64, device=data.device)
        self.slots = {slot.grid: slot for slot in plan.slots}
        self.chained: list[tuple[int, bool, int, int, int]] = []
        self._group = group
        dtype = torch.float64 if plan.fine_numel else data.dtype
        staged = plan.fine_numel or data.device.type != device.type
        self._sent = torch.empty(plan.numel + plan.fine_numel, dtype=dtype, device=device) if staged else data
        self._work: Any = None
        self._presence: tuple[list[bool], Tensor] | None = None

    def chain(self, buffers: Sequence[_Buffer], grids: Sequence[Grid]) -> None:
        """Find out what to take over from earlier buffers, in as few pieces as possible."""
        pieces = []
        for index, slot in self.slots.items():
            if slot.sums is not None and slot.after is not None:
                source = buffers[slot.after].slots[index].sums
                assert source is not None
                pieces.append((slot.after, slot.fine, source, slot.sums, math.prod(grids[index].plan.sums_shape)))
            if (after := slot.present_after) is not None:
                pieces.append((after, False, buffers[after].slots[index].present, slot.present, 1))
        for number, fine, source, target, length in pieces:
            if self.chained:
                last, part, before, there, size = self.chained[-1]
                if (last, part, before + size, there + size) == (number, fine, source, target):
                    self.chained[-1] = (last, part, before, there, size + length)
                    continue
            self.chained.append((number, fine, source, target, length))

    def clear(self, present: Sequence[bool]) -> None:
        """Zeros, and a one for every slot whose parameter has a gradient here."""
        pattern = list(present)
        if self._presence is None or self._presence[0] != pattern:
            ones = torch.zeros(self.data.shape, dtype=self.data.dtype)
            ones[[slot.present for slot, here in zip(self.slots.values(), pattern, strict=True) if here]] = 1
            self._presence = (pattern, ones.to(self.data.device))
        self.data.copy_(self._presence[1])
        self.fine.zero_()

    def send(self) -> None:
        """Start the all-reduce."""
        if self._sent is not self.data:
            for part, whole in self._parts():
                whole.copy_(part)
        self._work = dist.all_reduce(self._sent, group=self._group, async_op=True)

    def wait(self) -> None:
        """Return once the data hold the sum over the group; on a GPU, once everything queued later will find it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._sent is not self.data:
                for part, whole in self._parts():
                    part.copy_(whole)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each part, and its place in what is sent."""
        parts = (self.data, self.fine)
        return list(zip(parts, self._sent.split([part.numel() for part in parts]), strict=True))


def bytes_exchanged(items: Sequence[Item], buffers: Sequence[BufferPlan]) -> dict[int, int]:
    """Bytes per step that each straddling parameter puts into the exchange, presence slots included."""
    return bytes_in(buffers, grids_of([item.plans for item in items]), [item.dtype.itemsize for item in items])
