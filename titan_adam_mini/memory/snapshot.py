"""torch's memory snapshots: read with nothing executed, and the peak found again from the end backwards.

The format is that of `torch.cuda.memory._snapshot()`; where its documentation and torch's allocator differ, the
allocator counts: sizes in a trace are those asked for, before rounding, and a block that another stream still uses is
`active_pending_free`. A trace ends where the segments were written, and is the newest part of what happened.
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

HELD = "titan_adam_mini"
"""The key under which a run with TITAN_ADAM_MINI_NAMED_SNAPSHOTS=1 adds what it holds (`titan.storages.SNAPSHOT_KEY`):
`optimizer`, its name, and `tensors`, a list of (address, bytes, category)."""
KEPT = 100_000
"""How many entries torchtitan keeps (torchtitan/tools/profiling.py: MEMORY_SNAPSHOT_MAX_ENTRIES)."""


class Block(NamedTuple):
    """A piece of a segment: bytes, bytes asked for (0 if free), and the stack that allocated it."""

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
    """One device of a file."""

    path: Path
    device: int
    segments: list[int]
    """Their sizes in bytes."""
    blocks: list[Block]
    events: list[Event]
    optimizer: str
    """Empty if the file does not say."""
    held: list[tuple[int, int, str]]


@dataclass(frozen=True)
class Moment:
    """What was in use at one time, in bytes.

    Attributes:
        allocated: asked for by tensors that were there.
        reserved: all segments.
        categories: category -> bytes; their sum is `allocated`.
        without_frames: of `other`, what has no stack: it is older than the recording.
    """

    allocated: int
    reserved: int
    categories: dict[str, int]
    without_frames: int


@dataclass(frozen=True)
class Summary:
    """What a snapshot says, in bytes and counts.

    Attributes:
        end: when the snapshot was written.
        peak: when most was allocated, as far back as the trace reaches.
        peak_reserved: the most that was reserved, which may have been at another time.
        peak_entry: after how many entries of the trace the peak was; 0: before the first, so perhaps earlier still.
        rounding: at the end, what blocks in use have beyond what was asked for.
        awaiting: at the end, blocks whose free waits for another stream.
        free: at the end, reserved and not in use.
        largest_free: the largest free block.
        entries, seconds: how far the trace reaches back; `seconds` is None if it has no times.
        unmatched: entries that do not fit the blocks at the end (other threads allocated meanwhile).
        strangers: bytes of tensors that the run said it holds and that are in none of the blocks.
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
class _Life:
    """An allocation: alive in the states after entry `start` up to entry `end`; state n is that after n entries."""

    size: int
    end: int
    start: int = -1
    frames: Frames = ()
    category: str = ""
    block: Block | None = field(default=None, repr=False)


def summarize(snapshot: Snapshot) -> Summary:
    """Find the peak of a snapshot, and what memory was used for at the peak and at the end."""
    used = [block for block in snapshot.blocks if block.state == "active_allocated"]
    categories, strangers = _by_address(used, snapshot.held)
    origins = Origins((block.frames, categories[block.address]) for block in used if block.address in categories)
    lives, unmatched = _lives(used, snapshot.events)
    count = len(snapshot.events)
    change = [0] * (count + 1)
    for life in lives:
        change[life.start + 1] += life.size
        if life.end < count:
            change[life.end + 1] -= life.size
    allocated = list(accumulate(change))
    reserved = _reserved(sum(snapshot.segments), snapshot.events)
    peak = max(range(count + 1), key=lambda state: (allocated[state], state))

    def moment(state: int) -> Moment:
        sizes: Counter[str] = Counter()
        bare = 0
        for life in lives:
            if life.start < state <= life.end:
                known = categories.get(life.block.address) if life.block else None
                category = known or origins.of(life.frames)
                sizes[category] += life.size
                bare += life.size if category == OTHER and not life.frames else 0
        return Moment(allocated[state], reserved[state], dict(sizes), bare)

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
        strangers=strangers,
    )


def _lives(used: Sequence[Block], events: Sequence[Event]) -> tuple[list[_Life], int]:
    """Every allocation of the trace and before it, and how many entries fit none: from the end backwards."""
    open_: dict[int, _Life] = {
        block.address: _Life(block.requested, len(events), frames=block.frames, block=block) for block in used
    }
    lives, unmatched = [], 0
    for number in range(len(events) - 1, -1, -1):
        event = events[number]
        if event.action == "free_requested":
            unmatched += event.address in open_
            # The stack of a free is that of who freed; who allocated stands at the alloc, if the trace has it.
            open_[event.address] = _Life(event.size, number)
        elif event.action == "alloc":
            life = open_.pop(event.address, None)
            if life is None or life.size != event.size:
                unmatched += 1
            if life is not None:
                life.start = number
                life.frames = life.frames or event.frames
                lives.append(life)
    return [*lives, *open_.values()], unmatched


def _reserved(end: int, events: Sequence[Event]) -> list[int]:
    """Bytes reserved in every state."""
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    states = [end]
    for event in reversed(events):
        states.append(states[-1] - signs.get(event.action, 0) * event.size)
    return states[::-1]


def _by_address(used: Sequence[Block], held: Sequence[tuple[int, int, str]]) -> tuple[dict[int, str], int]:
    """Address of a block -> the category of the tensor in it; and the bytes of tensors in none."""
    blocks = sorted(used, key=lambda block: block.address)
    starts = [block.address for block in blocks]
    categories: dict[int, str] = {}
    strangers = 0
    for address, size, category in held:
        place = bisect_right(starts, address) - 1
        if place >= 0 and address + size <= blocks[place].address + blocks[place].size:
            categories.setdefault(blocks[place].address, category)
        else:
            strangers += size
    return categories, strangers


def read(path: Path, device: int | None = None) -> Snapshot:
    """Read one device of a memory snapshot; with None, the only one that the file has something of.

    Raises:
        ValueError: the file is none, in a sentence; nothing of it is executed.
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
            f"{path} is no memory snapshot: it holds a {error}, and a snapshot holds lists, tables, numbers and text "
            "only (nothing in it was run)"
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or no pickle: copy the file again, or take another snapshot") from None
    try:
        return _device(path, data, device)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is no memory snapshot of torch ({type(error).__name__}: {error}): "
            "expected what torch.cuda.memory._snapshot() gives, with 'segments' and 'device_traces'"
        ) from None


def _device(path: Path, data: Any, device: int | None) -> Snapshot:
    """One device of what a file holds; KeyError, TypeError or AttributeError if it is of another form."""
    segments, traces = data["segments"], data["device_traces"]
    there = sorted(
        {_number(one, "device") for one in segments} | {number for number, trace in enumerate(traces) if trace}
    )
    if not there:
        raise ValueError(f"{path} is a snapshot of no memory: nothing had been allocated on a device")
    if device is None and len(there) > 1:
        raise ValueError(f"{path} has devices {', '.join(map(str, there))}: choose one with --device N")
    device = there[0] if device is None else device
    if device not in there:
        raise ValueError(f"{path} has nothing of device {device}: it has {', '.join(map(str, there))}")
    own = [one for one in segments if one["device"] == device]
    held = data.get(HELD, {"optimizer": "", "tensors": []})
    return Snapshot(
        path=path,
        device=device,
        segments=[_number(one, "total_size") for one in own],
        blocks=[block for one in own for block in _blocks(one)],
        events=[_event(one) for one in traces[device]] if device < len(traces) else [],
        optimizer=str(held["optimizer"]),
        held=[(int(address), int(size), str(category)) for address, size, category in held["tensors"]],
    )


def _blocks(segment: Mapping[str, Any]) -> Iterator[Block]:
    for one in segment["blocks"]:
        sizes = [_number(one, key) for key in ("address", "size", "requested_size")]
        yield Block(sizes[0], sizes[1], sizes[2], str(one["state"]), _frames(one))


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
