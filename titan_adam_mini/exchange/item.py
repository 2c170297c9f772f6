"""Parameters as the exchange sees them, and their process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..kernels import Spec
from ..plan import BlockPlan, Group, ordered_groups
from ..private import active_fake_mode
from ..sharding import Axis, axes_of, local


@dataclass
class Item:
    """A parameter as the exchange sees it.

    Attributes:
        name: its name, for messages.
        param: the parameter itself (a DTensor or a plain tensor).
        plans: its blocks on this rank, one plan per grid.
        axes: the axes, of more than one rank, of its mesh.
        dtype: dtype of its sums and second moments.
        agreed: other values that must be the same on every rank that has a part of it.
        spec: what its engine needs to choose an implementation.
        served: the engine with its versions, and the reason for a fallback or None; the same on all ranks.
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
        """Whether any blocks lie on more than one rank."""
        return any(plan.axes for plan in self.plans)


def mesh_axes(param: Tensor) -> tuple[Axis, ...]:
    """The axes, of more than one rank, of a parameter's mesh."""
    return axes_of(param.device_mesh) if isinstance(param, DTensor) else ()


@dataclass(frozen=True)
class Channel:
    """A process group, and the device on which its tensors are reduced.

    Attributes:
        ranks: the group's.
        process_group: torch's.
        device: the parameters' device if the group can reduce there, else their mesh's device (CPU offload with NCCL
            only).
    """

    ranks: Group
    process_group: dist.ProcessGroup
    device: torch.device

    def max(self, values: list[int]) -> list[int]:
        """The largest of each value over the group. Collective; waits for the device."""
        # A plan on the meta device, or of fake tensors, is for inspection only: nothing is computed.
        if self.device.type == "meta" or active_fake_mode() is not None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return [int(value) for value in tensor.tolist()]


def channels_of(items: Sequence[Item]) -> dict[Group, Channel]:
    """The channels of all groups of the items' meshes, in the order in which all ranks use them."""
    found: dict[Group, Channel] = {}
    for item in items:
        for axis in item.axes:
            if axis.ranks not in found:
                assert isinstance(item.param, DTensor)
                mesh = item.param.device_mesh
                group, device = mesh.get_group(axis.index), local(item.param).device
                if device.type not in (mesh.device_type, "meta"):
                    supported = {torch.device(device_name).type for device_name in group._device_types}
                    device = device if device.type in supported else torch.device(mesh.device_type)
                found[axis.ranks] = Channel(axis.ranks, group, device)
    return {group: found[group] for group in ordered_groups([item.axes for item in items])}
