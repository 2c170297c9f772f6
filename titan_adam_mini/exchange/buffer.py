"""The buffers in which sums of straddling blocks are all-reduced: one per process group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan import BufferPlan, Grid
from .item import Channel


class Buffer:
    """One group's buffer. It is staged in another tensor if the group cannot reduce on its device, or if it has two
    parts, so that there is one all-reduce.

    Attributes:
        data: 1-D, the data to reduce.
        float64_sums: 1-D float64, the data to reduce in that precision.
        slots: grid -> its slot.
        chained: (number of an earlier buffer, whether in its float64 part, offset there, offset here, length): results
            that are copied into this buffer.
    """

    def __init__(self, plan: BufferPlan, data: Tensor, channel: Channel) -> None:
        self.data = data
        self.float64_sums = torch.empty(plan.float64_numel, dtype=torch.float64, device=data.device)
        self.slots = {slot.grid: slot for slot in plan.slots}
        self.chained: list[tuple[int, bool, int, int, int]] = []
        self._group, device = channel.process_group, channel.device
        dtype = torch.float64 if plan.float64_numel else data.dtype
        staged = plan.float64_numel or data.device.type != device.type
        self._sent = torch.empty(plan.numel + plan.float64_numel, dtype=dtype, device=device) if staged else data
        self._work: Any = None
        self._presence: tuple[list[bool], Tensor] | None = None

    def chain(self, buffers: Sequence[Buffer], grids: Sequence[Grid]) -> None:
        """Plan the copies from earlier buffers, merging adjacent ones."""
        pieces = []
        for index, slot in self.slots.items():
            if slot.sums is not None and slot.after is not None:
                source = buffers[slot.after].slots[index].sums
                assert source is not None
                pieces.append((slot.after, slot.float64, source, slot.sums, math.prod(grids[index].plan.sums_shape)))
            if (after := slot.present_after) is not None:
                pieces.append((after, False, buffers[after].slots[index].present, slot.present, 1))
        for number, float64, source, target, length in pieces:
            if self.chained:
                last, part, before, there, size = self.chained[-1]
                if (last, part, before + size, there + size) == (number, float64, source, target):
                    self.chained[-1] = (last, part, before, there, size + length)
                    continue
            self.chained.append((number, float64, source, target, length))

    def clear(self, present: Sequence[bool]) -> None:
        """Reset to zeros, and ones in the presence slots of parameters that have a gradient here."""
        pattern = list(present)
        if self._presence is None or self._presence[0] != pattern:
            ones = torch.zeros(self.data.shape, dtype=self.data.dtype)
            ones[[slot.present for slot, here in zip(self.slots.values(), pattern, strict=True) if here]] = 1
            self._presence = (pattern, ones.to(self.data.device))
        self.data.copy_(self._presence[1])
        self.float64_sums.zero_()

    def send(self) -> None:
        """Start the all-reduce."""
        if self._sent is not self.data:
            for part, sent in self._parts():
                sent.copy_(part)
        self._work = dist.all_reduce(self._sent, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the sum over the group; on a GPU, only later work on the stream waits."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._sent is not self.data:
                for part, sent in self._parts():
                    part.copy_(sent)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each part, and its view in the tensor that is sent."""
        parts = (self.data, self.float64_sums)
        return list(zip(parts, self._sent.split([part.numel() for part in parts]), strict=True))
