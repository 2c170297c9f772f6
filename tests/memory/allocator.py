"""A caching allocator on paper, for tests: it hands out addresses, and writes snapshots in torch's documented format.

It rounds, splits and merges as torch's does in outline (c10/cuda/CUDACachingAllocator.cpp): 512 bytes, segments of
2 MiB for small blocks and of 20 MiB or more for large ones, best fit. Beside that it keeps books of its own, from which
tests take what a snapshot's reader must find. No snapshot here was recorded on a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
ROUND = 512


def frame(filename: str, name: str, line: int = 1) -> dict[str, Any]:
    return {"filename": filename, "line": line, "name": name}


@dataclass
class Block:
    address: int
    size: int
    requested: int = 0
    state: str = "inactive"
    frames: list[dict[str, Any]] | None = None


@dataclass
class Segment:
    address: int
    size: int
    small: bool
    blocks: list[Block]


@dataclass(eq=False)
class Ticket:
    """One allocation in the books: entries of the whole recording at which it began and ended; None: outside."""

    size: int
    tag: str
    address: int
    began: int | None
    ended: int | None = None
    frames: list[dict[str, Any]] | None = None


@dataclass
class Allocator:
    device: int = 0
    recording: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    open: dict[int, Ticket] = field(default_factory=dict)
    books: list[tuple[int, int]] = field(default_factory=list)
    """(requested bytes, reserved bytes): when recording began, and after every entry."""
    _next: int = 0x7F00_0000_0000
    _freed: list[tuple[int, int]] = field(default_factory=list)

    def record(self) -> None:
        self.recording = True
        self.books = [self._count()]

    def alloc(self, size: int, tag: str, frames: list[dict[str, Any]] | None = None) -> int:
        rounded = -(-size // ROUND) * ROUND
        small = rounded <= MIB
        fits = [
            (block.size, block.address, segment, block)
            for segment in self.segments
            if segment.small == small
            for block in segment.blocks
            if block.state == "inactive" and block.size >= rounded
        ]
        if fits:
            _, _, segment, block = min(fits, key=lambda one: one[:2])
        else:
            whole = 2 * MIB if small else 20 * MIB if rounded < 10 * MIB else -(-rounded // (2 * MIB)) * 2 * MIB
            segment = self._segment(whole, small)
            block = segment.blocks[0]
        rest = block.size - rounded
        if rest >= ROUND if small else rest > MIB:
            place = segment.blocks.index(block)
            segment.blocks.insert(place + 1, Block(block.address + rounded, rest))
            block.size = rounded
        block.requested, block.state = size, "active_allocated"
        block.frames = frames if self.recording else None
        began = len(self.entries) if self.recording else None
        ticket = Ticket(size, tag, block.address, began, frames=block.frames)
        self.tickets.append(ticket)
        self.open[block.address] = ticket
        self._enter("alloc", addr=block.address, size=size, frames=frames)
        return block.address

    def free(self, address: int, later: bool = False) -> None:
        """Free a block, or, `later`, once another stream has done with it: see `complete`."""
        _, block = self._find(address)
        ticket = self.open.pop(address)
        ticket.ended = len(self.entries) if self.recording else -1
        block.state = "active_pending_free"
        # The stack of a free is that of whoever freed: it must mislead nobody.
        self._enter("free_requested", addr=address, size=block.requested, frames=[frame("/gc.py", "collect")])
        if not later:
            self.complete(address)

    def complete(self, address: int) -> None:
        segment, block = self._find(address)
        self._enter("free_completed", addr=address, size=block.requested, frames=[frame("/gc.py", "collect")])
        block.requested, block.state, block.frames = 0, "inactive", None
        merged: list[Block] = []
        for one in segment.blocks:
            if merged and merged[-1].state == one.state == "inactive":
                merged[-1].size += one.size
            else:
                merged.append(one)
        segment.blocks = merged

    def empty_cache(self) -> None:
        for segment in list(self.segments):
            if len(segment.blocks) == 1 and segment.blocks[0].state == "inactive":
                self.segments.remove(segment)
                self._freed.append((segment.address, segment.size))
                self._enter("segment_free", addr=segment.address, size=segment.size, frames=None)

    def fail(self, size: int) -> None:
        self._enter("oom", device_free=5 * MIB, size=size, frames=None)

    def pending(self) -> list[int]:
        return [one.address for part in self.segments for one in part.blocks if one.state == "active_pending_free"]

    def snapshot(self, kept: int | None = None) -> dict[str, Any]:
        """As `torch.cuda.memory._snapshot()` gives it, with the newest `kept` entries."""
        traces: list[list[dict[str, Any]]] = [[] for _ in range(self.device + 1)]
        traces[self.device] = self.entries[max(0, len(self.entries) - kept) :] if kept is not None else self.entries
        return {"segments": [self._told(segment) for segment in self.segments], "device_traces": traces}

    def _told(self, segment: Segment) -> dict[str, Any]:
        allocated = sum(one.size for one in segment.blocks if one.state == "active_allocated")
        active = sum(one.size for one in segment.blocks if one.state != "inactive")
        return {
            "device": self.device,
            "address": segment.address,
            "total_size": segment.size,
            "allocated_size": allocated,
            "active_size": active,
            "requested_size": sum(one.requested for one in segment.blocks),
            "stream": 0,
            "segment_type": "small" if segment.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "address": one.address,
                    "size": one.size,
                    "requested_size": one.requested,
                    "state": one.state,
                    "frames": one.frames or [],
                }
                for one in segment.blocks
            ],
        }

    def _segment(self, size: int, small: bool) -> Segment:
        again = next((one for one in self._freed if one[1] == size), None)
        if again:  # a driver gives addresses out again
            self._freed.remove(again)
            address = again[0]
        else:
            address, self._next = self._next, self._next + size + 2 * MIB
        segment = Segment(address, size, small, [Block(address, size)])
        self.segments.append(segment)
        self._enter("segment_alloc", addr=address, size=size, frames=None)
        return segment

    def _find(self, address: int) -> tuple[Segment, Block]:
        return next((part, one) for part in self.segments for one in part.blocks if one.address == address)

    def _enter(self, action: str, *, frames: list[dict[str, Any]] | None, **more: int) -> None:
        if self.recording:
            entry = {"action": action, **more, "stream": 0, "time_us": 1_000_000 + 10 * len(self.entries)}
            self.entries.append({**entry, "frames": frames or []})
            self.books.append(self._count())

    def _count(self) -> tuple[int, int]:
        return sum(one.size for one in self.open.values()), sum(one.size for one in self.segments)


def expected(books: Allocator, state: int, first: int, held: set[int], categories: dict[str, str]) -> Counter[str]:
    """Category -> bytes after `state` entries of the whole recording, as the books have it.

    What a reader can know: a tensor that the run says it holds (`held`, addresses) if it is there at the end; a stack,
    if the block is there at the end, or if its allocation is among the entries kept (`first` and later).
    """
    sizes: Counter[str] = Counter()
    for ticket in books.tickets:
        alive = (ticket.began is None or ticket.began < state) and (ticket.ended is None or ticket.ended >= state)
        if not alive:
            continue
        stays = ticket.ended is None
        told = ticket.began is not None and (stays or ticket.began >= first)
        named = stays and ticket.address in held
        sizes[categories[ticket.tag] if named or (told and ticket.frames) else "other"] += ticket.size
    return sizes
