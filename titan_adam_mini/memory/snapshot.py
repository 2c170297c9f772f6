"""torch's memory snapshots: read without executing anything, and their peak, found backwards from the end.

The format is that of `torch.cuda.memory._snapshot()`; where its documentation and torch's allocator differ, this
follows the allocator: sizes in a trace are those requested, before rounding, and a block that another stream still uses
is `active_pending_free`. A trace has the latest events, up to the time at which the segments were written.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..pickles import NotAllowed, unpickle
from .origins import OTHER, Frames, Origins

TENSORS_KEY = "titan_adam_mini"
"""The key under which a run with TITAN_ADAM_MINI_NAMED_SNAPSHOTS=1 adds its tensors (`titan.storages.SNAPSHOT_KEY`):
`optimizer`, its name, and `tensors`, a list of (address, bytes, category)."""
MAX_ENTRIES = 100_000
"""How many entries of a trace torchtitan keeps (torchtitan/tools/profiling.py: MEMORY_SNAPSHOT_MAX_ENTRIES)."""


class Block(NamedTuple):
    """A block of a segment: bytes, bytes requested (0 if free), and the stack that allocated it."""

    address: int
    size: int
    requested: int
    state: str
    frames: Frames


class Event(NamedTuple):
    """One entry of a trace; `size` in bytes."""

    action: str
    address: int
    size: int
    time_us: int
    frames: Frames


@dataclass(frozen=True)
class Snapshot:
    """One device of a snapshot file."""

    path: Path
    device: int
    segments: list[int]
    """Their sizes in bytes."""
    blocks: list[Block]
    events: list[Event]
    optimizer: str
    """Empty if the file does not name it."""
    tensors: list[tuple[int, int, str]]
    """Address, bytes and category of the tensors that the run named."""


@dataclass(frozen=True)
class Moment:
    """Memory at one time, in bytes.

    Attributes:
        allocated: requested by live tensors.
        reserved: all segments.
        categories: category -> bytes; their sum is `allocated`.
        without_frames: the part of `other` that has no stack, because it was allocated before recording began.
    """

    allocated: int
    reserved: int
    categories: dict[str, int]
    without_frames: int


@dataclass(frozen=True)
class Summary:
    """A snapshot in figures, bytes and counts.

    Attributes:
        end: when the snapshot was written.
        peak: when most was allocated, as far back as the trace reaches.
        peak_reserved: the most that was reserved, possibly at another time.
        peak_entry: number of trace entries before the peak; 0 if it is before the first, so perhaps earlier still.
        rounding: at the end, bytes of blocks in use beyond those requested.
        awaiting: at the end, blocks whose free waits for another stream.
        free: at the end, reserved and not in use.
        largest_free: the largest free block.
        entries, seconds: how far back the trace reaches; `seconds` is None if it has no times.
        unmatched: entries inconsistent with the blocks at the end (other threads allocated meanwhile).
        strangers: bytes of tensors that the run named and that are in none of the blocks.
    """

    end: Moment
    peak: Moment
    peak_reserved: int
    peak_entry: int
    rounding: int
    awaiting: int
    free: int
    largest_free: int
    segments: int
    entries: int
    seconds: float | None
    allocations: int
    ooms: int
    unmatched: int
    strangers: int


@dataclass
class _Allocation:
    """An allocation, live in the states after entry `start` up to entry `end`; state n is that after n entries."""

    size: int
    end: int
    start: int = -1
    frames: Frames = ()
    category: str = ""
    block: Block | None = field(default=None, repr=False)


def summarize(snapshot: Snapshot) -> Summary:
    """Find the peak of a snapshot, and the memory by category at the peak and at the end."""
    used = [block for block in snapshot.blocks if block.state == "active_allocated"]
    categories, unknown = _by_address(used, snapshot.tensors)
    origins = Origins((block.frames, categories[block.address]) for block in used if block.address in categories)
    allocations, unmatched = _allocations(used, snapshot.events)
    count = len(snapshot.events)
    change = [0] * (count + 1)
    for allocation in allocations:
        change[allocation.start + 1] += allocation.size
        if allocation.end < count:
            change[allocation.end + 1] -= allocation.size
    allocated = list(accumulate(change))
    reserved = _reserved(sum(snapshot.segments), snapshot.events)
    peak = max(range(count + 1), key=lambda state: (allocated[state], state))

    def moment(state: int) -> Moment:
        sizes: Counter[str] = Counter()
        without_frames = 0
        for allocation in allocations:
            if allocation.start < state <= allocation.end:
                known = categories.get(allocation.block.address) if allocation.block else None
                category = known or origins.of(allocation.frames)
                sizes[category] += allocation.size
                without_frames += allocation.size if category == OTHER and not allocation.frames else 0
        return Moment(allocated[state], reserved[state], dict(sizes), without_frames)

    times = [event.time_us for event in snapshot.events if event.time_us]
    free = [block.size for block in snapshot.blocks if block.state == "inactive"]
    return Summary(
        end=moment(count),
        peak=moment(peak),
        peak_reserved=max(reserved),
        peak_entry=peak,
        rounding=sum(block.size - block.requested for block in used),
        awaiting=sum(block.size for block in snapshot.blocks if block.state not in ("active_allocated", "inactive")),
        free=sum(free),
        largest_free=max(free, default=0),
        segments=len(snapshot.segments),
        entries=count,
        seconds=(times[-1] - times[0]) / 1e6 if times else None,
        allocations=sum(event.action == "alloc" for event in snapshot.events),
        ooms=sum(event.action == "oom" for event in snapshot.events),
        unmatched=unmatched,
        strangers=unknown,
    )


def _allocations(used: Sequence[Block], events: Sequence[Event]) -> tuple[list[_Allocation], int]:
    """Every allocation of the trace and before it (found from its end), and the number of entries that fit none."""
    live: dict[int, _Allocation] = {
        block.address: _Allocation(block.requested, len(events), frames=block.frames, block=block) for block in used
    }
    allocations, unmatched = [], 0
    for number in range(len(events) - 1, -1, -1):
        event = events[number]
        if event.action == "free_requested":
            unmatched += event.address in live
            # The stack of a free belongs to the code that freed; the allocation's is at its alloc, if the trace has it.
            live[event.address] = _Allocation(event.size, number)
        elif event.action == "alloc":
            allocation = live.pop(event.address, None)
            if allocation is None or allocation.size != event.size:
                unmatched += 1
            if allocation is not None:
                allocation.start = number
                allocation.frames = allocation.frames or event.frames
                allocations.append(allocation)
    return [*allocations, *live.values()], unmatched


def _reserved(end: int, events: Sequence[Event]) -> list[int]:
    """Bytes reserved in every state."""
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    states = [end]
    for event in reversed(events):
        states.append(states[-1] - signs.get(event.action, 0) * event.size)
    return states[::-1]


def _by_address(used: Sequence[Block], tensors: Sequence[tuple[int, int, str]]) -> tuple[dict[int, str], int]:
    """Address of a block -> the category of the tensor in it; and the bytes of tensors that are in no block."""
    blocks = sorted(used, key=lambda block: block.address)
    starts = [block.address for block in blocks]
    categories: dict[int, str] = {}
    unknown = 0
    for address, size, category in tensors:
        place = bisect_right(starts, address) - 1
        if place >= 0 and address + size <= blocks[place].address + blocks[place].size:
            categories.setdefault(blocks[place].address, category)
        else:
            unknown += size
    return categories, unknown


def read(path: Path, device: int | None = None) -> Snapshot:
    """Read one device of a memory snapshot; with None, the only one that has entries. Nothing in it is executed.

    Raises:
        ValueError: the file is not a memory snapshot, or does not have that device.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise ValueError(f"{path} is empty: its run was stopped before it had written the snapshot")
    try:
        data = unpickle(content)
    except NotAllowed as error:
        raise ValueError(
            f"{path} is not a memory snapshot: it contains a {error}, and a snapshot has lists, dictionaries, numbers "
            "and text only (nothing in it was executed)"
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or not a pickle: copy it again, or take another snapshot") from None
    try:
        return _device(path, data, device)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a memory snapshot of torch ({type(error).__name__}: {error}): "
            "expected the data of torch.cuda.memory._snapshot(), with 'segments' and 'device_traces'"
        ) from None


def _device(path: Path, data: Any, device: int | None) -> Snapshot:
    """One device of a file's content; raises KeyError, TypeError or AttributeError if its structure is different."""
    segments, traces = data["segments"], data["device_traces"]
    devices = sorted(
        {_number(segment, "device") for segment in segments} | {number for number, trace in enumerate(traces) if trace}
    )
    if not devices:
        raise ValueError(f"{path} is an empty snapshot: nothing had been allocated on a device")
    if device is None and len(devices) > 1:
        raise ValueError(f"{path} has devices {', '.join(map(str, devices))}: choose one with --device N")
    device = devices[0] if device is None else device
    if device not in devices:
        raise ValueError(f"{path} has nothing of device {device}: it has {', '.join(map(str, devices))}")
    own = [segment for segment in segments if segment["device"] == device]
    named = data.get(TENSORS_KEY, {"optimizer": "", "tensors": []})
    return Snapshot(
        path=path,
        device=device,
        segments=[_number(segment, "total_size") for segment in own],
        blocks=[block for segment in own for block in _blocks(segment)],
        events=[_event(entry) for entry in traces[device]] if device < len(traces) else [],
        optimizer=str(named["optimizer"]),
        tensors=[(int(address), int(size), str(category)) for address, size, category in named["tensors"]],
    )


def _blocks(segment: Mapping[str, Any]) -> Iterator[Block]:
    for block in segment["blocks"]:
        address, size, requested = (_number(block, key) for key in ("address", "size", "requested_size"))
        yield Block(address, size, requested, str(block["state"]), _frames(block))


def _event(entry: Mapping[str, Any]) -> Event:
    address = 0 if entry["action"] == "oom" else _number(entry, "addr")
    time = _number(entry, "time_us") if "time_us" in entry else 0
    return Event(str(entry["action"]), address, _number(entry, "size"), time, _frames(entry))


def _frames(entry: Mapping[str, Any]) -> Frames:
    frames: Frames = entry.get("frames", ())
    for key in ("filename", "line", "name") if frames else ():
        frames[0][key]
    return frames


def _number(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}")
    return value
