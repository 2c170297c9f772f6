"""All communication of a step: Partial gradients completed, straddling blocks summed, the plan checked at the start.

`local_sums -> all_reduce -> finish`. Per process group and step there is at most one all-reduce for Partial
gradients and one for the sums, none where nothing is Partial or straddles. Everything else in the package is local.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from .kernels import Engine
from .layout import Tiles
from .plan import BlockPlan, BufferPlan, Group, ordered_groups, plan_buffers
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
    """

    name: str
    param: Tensor
    plan: BlockPlan
    axes: tuple[Axis, ...]
    dtype: torch.dtype


def mesh_axes(param: Tensor) -> tuple[Axis, ...]:
    """The axes, of more than one rank, of the mesh that a parameter lives on."""
    return axes_of(param.device_mesh) if isinstance(param, DTensor) else ()


class Exchange:
    """The communication of one optimizer on one rank. Building it is collective: it checks the plan."""

    def __init__(self, items: Sequence[Item], engine: Engine) -> None:
        """Plan the exchange of `items` and check it with all ranks of every group.

        Raises ValueError on all ranks of a group whose plans differ.
        """
        self.items = list(items)
        self.engine = engine
        axes = [item.axes for item in self.items]
        self.buffers = plan_buffers([item.plan for item in self.items], axes)
        self.groups = {group: self._process_group(group) for group in ordered_groups(axes)}
        self._check_plans()
        self._data = [torch.empty(0) for _ in self.buffers]
        self._work: list[_Reduction | None] = [None for _ in self.buffers]
        self._slots = [{slot.param: slot for slot in plan.slots} for plan in self.buffers]
        self._last = {index: number for number, slots in enumerate(self._slots) for index in slots}
        self._last_sums = {
            index: number
            for number, slots in enumerate(self._slots)
            for index, slot in slots.items()
            if slot.sums is not None
        }
        self._partial: dict[Group, list[tuple[int, int]]] | None = None

    @property
    def straddling(self) -> list[int]:
        """Indices of the parameters whose blocks straddle."""
        return list(self._last_sums)

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
                rows[axis.ranks].append((item.name, str(item.plan.layout), place, item.plan.keep, str(item.dtype)))
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
                "the optimizer the same parameters, names, roles, placements and head counts, in the same order"
            )

    def _reduce_max(self, group: Group, values: list[int]) -> list[int]:
        device = self._device(group)
        if device.type == "meta":  # a plan on the meta device is made to be looked at: nothing is computed
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
        for item in self.items:
            try:
                grads.append(None if item.param.grad is None else local_gradient(item.param, item.param.grad))
            except ValueError as error:
                raise ValueError(f"AdamMini cannot use the gradient of {item.name!r}: {error}") from None
        if self._partial is None:
            self._partial = self._agree_on_partial()
        planned = {member for members in (self._partial or {}).values() for member in members}
        for index, item in enumerate(self.items):
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

    def start(self, grads: Sequence[Tensor | None]) -> None:
        """Compute this rank's sums of the straddling blocks and send them off."""
        for number, plan in enumerate(self.buffers):
            data = self._buffer(number)
            for slot in plan.slots:
                index, grad = slot.param, grads[slot.param]
                if slot.present_after is not None:
                    data[slot.present] = self._present(slot.present_after, index)
                elif grad is not None:
                    data[slot.present] = 1
                if slot.sums is not None:
                    sums = self._view(data, index, slot.sums)
                    if slot.after is not None:
                        sums.copy_(self._sums(slot.after, index))
                    elif grad is not None:
                        self._add_sums(sums, index, grad)
            self._work[number] = _Reduction(data, self.groups[plan.group], self._device(plan.group))

    def _present(self, number: int, index: int) -> Tensor:
        """How many ranks have a parameter's gradient, 0-d, as one buffer's exchange left it."""
        return self._wait(number)[self._slots[number][index].present]

    def _sums(self, number: int, index: int) -> Tensor:
        """A parameter's sums, in the plan's `sums_shape`, as one buffer's exchange left them."""
        offset = self._slots[number][index].sums
        assert offset is not None
        return self._view(self._wait(number), index, offset)

    def _buffer(self, number: int) -> Tensor:
        """The zeroed buffer of one group."""
        plan = self.buffers[number]
        items = [self.items[slot.param] for slot in plan.slots]
        device = local(items[0].param).device
        if self._data[number].numel() != plan.numel or self._data[number].device != device:
            dtype = torch.float64 if any(item.dtype == torch.float64 for item in items) else torch.float32
            self._data[number] = torch.empty(plan.numel, dtype=dtype, device=device)
        return self._data[number].zero_()

    def _view(self, data: Tensor, index: int, offset: int) -> Tensor:
        shape = self.items[index].plan.sums_shape
        return data[offset : offset + math.prod(shape)].view(shape)

    def _add_sums(self, target: Tensor, index: int, grad: Tensor) -> None:
        item = self.items[index]
        for view, (tiles, place, _) in zip(item.plan.shard.views(grad), item.plan.parts, strict=True):
            if view.numel():
                target[place] += self.engine.square_sums(view, tiles, item.plan.keep, item.dtype)

    def _wait(self, number: int) -> Tensor:
        work = self._work[number]
        assert work is not None, "a buffer is read before it was sent"
        work.wait()
        return self._data[number]

    def present(self, index: int, grad: Tensor | None) -> bool:
        """Does any rank that this one knows of have a gradient of the parameter?"""
        if grad is not None:
            return True
        if index not in self._last:
            return False
        return bool(self._present(self._last[index], index).item() > 0)

    def means(self, index: int, grad: Tensor | None) -> Tensor:
        """Mean square of the gradient over every block of this rank's reach, in the item's dtype.

        A missing gradient counts as zeros. Waits for the exchange if the blocks straddle.
        """
        item = self.items[index]
        plan = item.plan
        if index in self._last_sums:
            sums = self._sums(self._last_sums[index], index).to(item.dtype)
            if sums.numel() == 0:
                return sums.new_zeros(plan.grid_shape)
            sums = self.engine.fold(sums, plan.reach_tiles, plan.keep)
        else:
            sums = torch.zeros(plan.sums_shape, dtype=item.dtype, device=local(item.param).device)
            if grad is not None and grad.numel():
                self._add_sums(sums, index, grad)
        for dim, tiles in enumerate(plan.reach_tiles):
            if tiles.uniform is None:
                sums = sums / _lengths(tiles, sums.dtype, sums.device).view(-1, *[1] * (sums.ndim - dim - 1))
        return sums / math.prod(tiles.uniform or 1 for tiles in plan.reach_tiles)

    def finish(self) -> None:
        """Wait for whatever nobody asked for, so that the buffers are free for the next step."""
        for number, work in enumerate(self._work):
            if work is not None:
                work.wait()
            self._work[number] = None


@cache
def _lengths(tiles: Tiles, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The length of every tile of a dim, as a tensor."""
    return torch.tensor(tiles.lengths(), dtype=dtype, device=device)


class _Reduction:
    """One all-reduce under way; the data are staged through the group's device where it cannot reach theirs."""

    def __init__(self, data: Tensor, group: dist.ProcessGroup, device: torch.device) -> None:
        self.data = data
        self.sent = data if data.device.type == device.type else data.to(device)
        self.work = dist.all_reduce(self.sent, group=group, async_op=True)

    def wait(self) -> None:
        """Return once the data hold the sum over the group."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.sent is not self.data:
                self.data.copy_(self.sent)


def bytes_exchanged(items: Sequence[Item], buffers: Sequence[BufferPlan]) -> dict[int, int]:
    """Bytes per step that each straddling parameter puts into the exchange, presence slots included."""
    result: dict[int, int] = {}
    for buffer in buffers:
        wide = any(items[slot.param].dtype == torch.float64 for slot in buffer.slots)
        for slot in buffer.slots:
            numel = 1 + (math.prod(items[slot.param].plan.sums_shape) if slot.sums is not None else 0)
            result[slot.param] = result.get(slot.param, 0) + numel * (8 if wide else 4)
    return result
