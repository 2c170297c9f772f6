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

from .kernels import Engine, Work
from .plan import BlockPlan, BufferPlan, Group, bytes_in, ordered_groups, plan_buffers
from .sharding import Axis, axes_of, local, local_gradient

MISSING, COMPLETE, PARTIAL = 0, 1, 2
"""What is known of a gradient on a mesh axis; the largest that any rank knows holds for all."""


@dataclass
class Item:
    """A parameter as the exchange sees it.

    Attributes:
        name: its name, for messages.
        param: the parameter itself (a DTensor or a plain tensor).
        plan: its blocks on this rank.
        axes: the axes, of more than one rank, of its mesh.
        dtype: dtype of its sums and second moments.
        agreed: what else must be the same on every rank that has a part of it.
    """

    name: str
    param: Tensor
    plan: BlockPlan
    axes: tuple[Axis, ...]
    dtype: torch.dtype
    agreed: object = None


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
        self.buffers = plan_buffers([item.plan for item in self.items], axes)
        self.groups = {group: self._process_group(group) for group in ordered_groups(axes)}
        self._check_plans()
        self._buffers: list[_Buffer] = []
        for plan in self.buffers:
            wide = any(self.items[slot.param].dtype == torch.float64 for slot in plan.slots)
            home = local(self.items[plan.slots[0].param].param).device
            data = torch.empty(plan.numel, dtype=torch.float64 if wide else torch.float32, device=home)
            self._buffers.append(_Buffer(plan, data, self.groups[plan.group], self._device(plan.group)))
        for buffer in self._buffers:
            buffer.chain(self._buffers, [item.plan for item in self.items])
        self._specs: list[Any] = [None for _ in self.items]
        self._partial: dict[Group, list[tuple[int, int]]] | None = None

    @property
    def straddling(self) -> list[int]:
        """Indices of the parameters whose blocks straddle."""
        return list({slot.param: None for plan in self.buffers for slot in plan.slots if slot.sums is not None})

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
                rows[axis.ranks].append(
                    (item.name, str(item.plan.layout), place, item.plan.keep, str(item.dtype), item.agreed)
                )
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
                "rounding, in the same order"
            )

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

    def places(self, index: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Where one parameter's numbers are in the buffers, which stay where they are: this rank's own sums before the
        exchange, all ranks' sums after it (both of the plan's `sums_shape`), and the number of ranks that have a
        gradient, 0-d. None for what is not exchanged.
        """
        shape = self.items[index].plan.sums_shape
        own = complete = present = None
        for buffer in self._buffers:
            slot = buffer.slots.get(index)
            if slot is None:
                continue
            present = buffer.data[slot.present]
            if slot.sums is not None:
                complete = buffer.data[slot.sums : slot.sums + math.prod(shape)].view(shape)
                own = complete if slot.after is None else own
        return own, complete, present

    def start(self, works: Sequence[Work], engine: Engine) -> None:
        """Compute this rank's sums of the straddling blocks and send them off; `works` has one for every item."""
        for buffer in self._buffers:
            buffer.clear([work.grad is not None for work in works])
        engine.square_sums(
            [work for work in works if work.own_sums is not None and work.grad is not None and work.grad.numel()]
        )
        for buffer in self._buffers:
            for number, source, target, length in buffer.chained:
                self._buffers[number].wait()
                buffer.data[target : target + length] = self._buffers[number].data[source : source + length]
            buffer.send()

    def finish(self) -> None:
        """Return once every buffer holds the sums of all ranks."""
        for buffer in self._buffers:
            buffer.wait()


class _Buffer:
    """One group's buffer; its data are staged through the group's device where the group cannot reach theirs.

    Attributes:
        data: 1-D, what is exchanged.
        slots: who stands where.
        chained: (number of another buffer, offset there, offset here, length): what this one takes over, completed.
    """

    def __init__(self, plan: BufferPlan, data: Tensor, group: dist.ProcessGroup, device: torch.device) -> None:
        self.data = data
        self.slots = {slot.param: slot for slot in plan.slots}
        self.chained: list[tuple[int, int, int, int]] = []
        self._group = group
        self._sent = data if data.device.type == device.type else torch.empty_like(data, device=device)
        self._work: Any = None
        self._presence: tuple[list[bool], Tensor] | None = None

    def chain(self, buffers: Sequence[_Buffer], plans: Sequence[BlockPlan]) -> None:
        """Find out what to take over from earlier buffers, in as few pieces as possible."""
        pieces = []
        for index, slot in self.slots.items():
            if slot.sums is not None and slot.after is not None:
                source = buffers[slot.after].slots[index].sums
                assert source is not None
                pieces.append((slot.after, source, slot.sums, math.prod(plans[index].sums_shape)))
            if slot.present_after is not None:
                pieces.append((slot.present_after, buffers[slot.present_after].slots[index].present, slot.present, 1))
        for number, source, target, length in pieces:
            if self.chained:
                last, before, there, size = self.chained[-1]
                if (last, before + size, there + size) == (number, source, target):
                    self.chained[-1] = (last, before, there, size + length)
                    continue
            self.chained.append((number, source, target, length))

    def clear(self, present: Sequence[bool]) -> None:
        """Zeros, and a one for every parameter that has a gradient here."""
        pattern = [present[index] for index in self.slots]
        if self._presence is None or self._presence[0] != pattern:
            ones = torch.zeros(self.data.shape, dtype=self.data.dtype)
            ones[[slot.present for slot, here in zip(self.slots.values(), pattern, strict=True) if here]] = 1
            self._presence = (pattern, ones.to(self.data.device))
        self.data.copy_(self._presence[1])

    def send(self) -> None:
        """Start the all-reduce."""
        if self._sent is not self.data:
            self._sent.copy_(self.data)
        self._work = dist.all_reduce(self._sent, group=self._group, async_op=True)

    def wait(self) -> None:
        """Return once the data hold the sum over the group; on a GPU, once everything queued later will find it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._sent is not self.data:
                self.data.copy_(self._sent)


def bytes_exchanged(items: Sequence[Item], buffers: Sequence[BufferPlan]) -> dict[int, int]:
    """Bytes per step that each straddling parameter puts into the exchange, presence slots included."""
    return bytes_in(buffers, [item.plan for item in items], [item.dtype.itemsize for item in items])
