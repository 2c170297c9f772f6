"""This rank's gradients: Partial ones are reduced before they are squared, even if they are missing on some ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..plan import Group
from ..sharding import local, local_gradient
from .item import Channel, Item

MISSING, COMPLETE, PARTIAL_SUM, PARTIAL_AVG = range(4)
"""What is known of a gradient on a mesh axis where its parameter is replicated. The maximum over the ranks is used:
ranks differ only in what they have not seen yet."""
_SLOT = (0.0, 0.0, 1.0, 65536.0)
"""The same as addends, from whose sum over fewer than 65536 ranks the maximum can be read."""

Place = tuple[int, int]
"""(index of a parameter, mesh axis)"""


class Gradients:
    """The local gradients of `items` in every step.

    Each process group agrees once on which gradients are Partial, in the first step in which any of its ranks has one.
    """

    def __init__(self, items: Sequence[Item], channels: Mapping[Group, Channel]) -> None:
        self._items, self._channels = items, channels
        self._specs: list[Any] = [None for _ in items]
        self._known: dict[Place, int] = {}
        self._completions: dict[Group, _Completion | None] = {}
        for index, item in enumerate(items):
            for axis in item.axes:
                assert isinstance(item.param, DTensor)
                if isinstance(item.param.placements[axis.index], Replicate):
                    self._known[index, axis.index] = MISSING
                    self._completions[axis.ranks] = None  # not settled

    def take(self) -> list[Tensor | None]:
        """This rank's local gradients, Partial ones reduced; None where there is none. Collective.

        Raises ValueError, naming the parameter, for a gradient that cannot update it.
        """
        grads: list[Tensor | None] = []
        for index, item in enumerate(self._items):
            grad = item.param.grad
            if grad is None:
                grads.append(None)
            elif getattr(grad, "_spec", None) is self._specs[index] is not None:
                grads.append(local(grad))  # same placements as the last one, which had its parameter's
            else:
                try:
                    grads.append(local_gradient(item.param, grad))
                    self._learn(index, grad)
                except ValueError as error:
                    raise ValueError(f"AdamMini cannot use the gradient of {item.name!r}: {error}") from None
                if isinstance(grad, DTensor) and grad.placements == item.param.placements:
                    self._specs[index] = grad._spec
        for group, channel in self._channels.items():
            if group in self._completions:
                completion = self._completions[group] or self._settle(channel)
                self._completions[group] = completion
                if completion is not None and completion.members:
                    completion.complete(self._items, grads, self._known)
        return grads

    def _learn(self, index: int, grad: Tensor) -> None:
        """Record on which axes a gradient is Partial."""
        for axis in self._items[index].axes:
            place = (index, axis.index)
            if place not in self._known:
                continue
            assert isinstance(grad, DTensor)
            placement, known = grad.placements[axis.index], COMPLETE
            if isinstance(placement, Partial):
                known = PARTIAL_AVG if placement.reduce_op == "avg" else PARTIAL_SUM
                completion = self._completions[axis.ranks]
                if completion is not None and place not in completion.members:
                    raise ValueError(
                        f"it is Partial on mesh axis {axis.index}, but in the first step neither it nor another "
                        "gradient of that axis was; build a new optimizer when the gradients' placements change"
                    )
            self._known[place] = max(known, self._known[place])

    def _settle(self, channel: Channel) -> _Completion | None:
        """Agree on which gradients are Partial along one group; None while no rank of it has seen any gradient. All
        ranks of the group call this in the same steps, since the result is the same on all of them.

        What the ranks know about the parameters' other axes is shared too, so that a rank without a gradient knows it
        before it reaches the groups of those axes. A parameter without a gradient on any rank is treated as Partial, so
        that it has a slot if it gets a gradient later.
        """
        members = [
            (index, axis.index)
            for index, item in enumerate(self._items)
            for axis in item.axes
            if axis.ranks == channel.ranks and (index, axis.index) in self._known
        ]
        indices = {index for index, _ in members}
        shared = [place for place in self._known if place[0] in indices]
        self._known.update(zip(shared, channel.max([self._known[place] for place in shared]), strict=True))
        if all(self._known[place] == MISSING for place in members):
            return None
        if all(self._known[place] < PARTIAL_SUM for place in members):
            members = []
        return _Completion([place for place in members if self._known[place] != COMPLETE], self._known, channel)


class _Completion:
    """The Partial gradients of one group, summed in one all-reduce, in float32 or wider.

    A rank that has no gradient uses the sum of the others', so that replicas stay equal, and passes it on along the
    parameter's later axes. Therefore one slot per parameter and replicated axis counts the ranks whose gradient is
    Partial there.

    Attributes:
        members: which parameters, with the group's mesh axis.
    """

    def __init__(self, members: list[Place], known: dict[Place, int], channel: Channel) -> None:
        self.members = members
        self._slots = [place for index, _ in members for place in known if place[0] == index]
        self._channel = channel
        self._head: tuple[list[float], Tensor] = ([], torch.empty(0))

    def complete(self, items: Sequence[Item], grads: list[Tensor | None], known: dict[Place, int]) -> None:
        """Replace the local gradients by their sums over the group. Collective."""
        wide = any(items[index].dtype == torch.float64 for index, _ in self.members)
        head = [_SLOT[known[place]] if grads[place[0]] is not None else 0.0 for place in self._slots]
        if self._head[0] != head:  # copied only if changed: a copy from the host synchronises
            dtype = torch.float64 if wide else torch.float32
            self._head = (head, torch.tensor(head, dtype=dtype, device=self._channel.device))
        numels = [local(items[index].param).numel() for index, _ in self.members]
        slots = self._head[1]
        buffer = torch.cat([slots, slots.new_zeros(sum(numels))])
        views = buffer[len(head) :].split(numels)
        for place, view in zip(self.members, views, strict=True):
            grad = grads[place[0]]
            if grad is not None and known[place] >= PARTIAL_SUM:
                view.copy_(grad.reshape(-1))
                if known[place] == PARTIAL_AVG:
                    view.div_(len(self._channel.ranks))
        dist.all_reduce(buffer, group=self._channel.process_group)
        received: set[Place] = set()
        if any(grads[index] is None for index, _ in self.members):
            for place, count in zip(self._slots, buffer[: len(head)].tolist(), strict=True):
                if grads[place[0]] is None and count:
                    known[place] = PARTIAL_AVG if count >= _SLOT[PARTIAL_AVG] else PARTIAL_SUM
                    received.add(place)
        for place, view in zip(self.members, views, strict=True):
            index = place[0]
            if (known[place] >= PARTIAL_SUM and grads[index] is not None) or place in received:
                data = local(items[index].param)
                grads[index] = view.view(data.shape).to(data.device)
