"""How optimizers are measured: in turns within one process, on the same parameters and gradients.

A step changes parameters in place, which harms nobody's time, so all competitors share them and only the state is
each one's own. A large `copy_` takes its turn as one more competitor: it is what a step's bytes are compared with.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .competitors import Competitor
from .part import Part, Tensors

WARM_UP = 3
BLOCK_ROUNDS = 4
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single"),
)


@dataclass
class Result:
    """What was seen of one competitor.

    Attributes:
        status: "measured", "not installed" or "failed".
        note: its engine, or the first line of its error.
        ms: milliseconds of every timed step.
        launches: CUDA kernels per step; None without CUDA.
    """

    name: str
    version: str = ""
    status: str = "measured"
    note: str = ""
    ms: list[float] = field(default_factory=list)
    state_bytes: int = 0
    launches: int | None = None
    collectives: int = 0
    collective_bytes: int = 0

    def spread(self) -> tuple[float, float, float]:
        """10th percentile, median and 90th percentile of the milliseconds."""
        tenths = statistics.quantiles(self.ms, n=10, method="inclusive")
        return tenths[0], statistics.median(self.ms), tenths[-1]


@dataclass
class Measured:
    """All results, the copy's, and how turns were taken."""

    results: list[Result]
    copy: Result
    copy_bytes: int
    turns: str

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the copy read and wrote."""
        return 2 * self.copy_bytes / (self.copy.spread()[1] / 1e3)


def bytes_moved(params: float, grads: float, state: float) -> float:
    """Bytes that a step cannot avoid: parameters and state read and written, gradients read.

    With float32 throughout that is 28 per parameter for AdamW and 20 where second moments are negligible.
    """
    return 2 * params + grads + 2 * state


def bytes_needed(part: Part, device: torch.device) -> int:
    """Memory for parameters, gradients, the largest state (two moments), one temporary, and the copy."""
    return 2 * part.bytes + _largest_state(part) + 2 * COPY_BYTES[device.type]


def _largest_state(part: Part) -> int:
    return 3 * sum(one.numel * max(4, one.dtype.itemsize) for one in part.held)


def bytes_free(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(available[0]) if available else None


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors in an optimizer's state on this rank, memory that several share counted once."""
    seen: dict[int, int] = {}
    for tensor in _tensors_in(value):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors_in(value: Any) -> Iterable[Tensor]:
    """The plain tensors inside containers, DTensors, tensor subclasses, and objects that hold tensors."""
    if isinstance(value, DTensor):
        yield from _tensors_in(value.to_local())
    elif isinstance(value, Tensor):
        inner = type(value) not in (Tensor, torch.nn.Parameter) and hasattr(value, "__tensor_flatten__")
        if inner:
            yield from _tensors_in([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors_in(one)
    elif type(value).__module__.split(".")[0] not in ("builtins", "torch") and hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value))


class Collectives(AbstractContextManager["Collectives"]):
    """`with Collectives() as seen: ...` counts the calls of torch.distributed's collectives, and their bytes: those of
    the larger side, what goes in or what comes out."""

    def __init__(self) -> None:
        self.count = self.bytes = 0

    def __enter__(self) -> Collectives:
        self._own = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name, function in self._own.items():
            setattr(dist, name, partial(self._called, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._own.items():
            setattr(dist, name, function)

    def _called(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        sides = [one if isinstance(one, list) else [one] for one in (*args, *kwargs.values())]
        self.bytes += max(sum(one.nbytes for one in side if isinstance(one, Tensor)) for side in sides)
        return function(*args, **kwargs)


class _Copy:
    """A copy of memory in an optimizer's clothes."""

    def __init__(self, device: torch.device) -> None:
        self.source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
        self.target = torch.zeros_like(self.source)

    def step(self) -> None:
        self.target.copy_(self.source)


class _Lane:
    """One competitor at work: its optimizer while it has one, and its result."""

    def __init__(self, result: Result, build: Callable[[], Any], device: torch.device) -> None:
        self.result, self._build, self._device = result, build, device
        self.optimizer: Any = None
        self._counted = False

    def prepare(self) -> None:
        """Build and warm up; what a step launches and sends is counted on the way, once, never while timing."""
        if self.result.status != "measured":
            return
        with _Told(self):
            self.optimizer = self._build()
            for number in range(WARM_UP):
                if self._counted or number == 0:
                    self.optimizer.step()
                elif number == 1:
                    with Collectives() as seen:
                        self.optimizer.step()
                    self.result.collectives, self.result.collective_bytes = seen.count, seen.bytes
                else:
                    self.result.launches = _launches(self.optimizer.step, self._device)
            self._counted = True
            self.result.state_bytes = stored_bytes(getattr(self.optimizer, "state", {}))
            self.result.note = getattr(self.optimizer, "_engine_line", "").partition(";")[0]

    def step(self) -> None:
        """One timed step."""
        if self.optimizer is not None:
            with _Told(self):
                self.result.ms.append(_milliseconds(self.optimizer.step, self._device))

    def release(self) -> None:
        """Give the state back."""
        self.optimizer = None
        gc.collect()


class _Told(AbstractContextManager["_Told"]):
    """Turns an exception into a row that tells it."""

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._lane.result.status, self._lane.result.note = "failed", first_line(error)
        self._lane.result.ms.clear()
        self._lane.optimizer = None
        return True


def first_line(error: Exception) -> str:
    """An exception as its type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


QUEUED = 4
"""Steps that a GPU is given in a row, as training queues its work: one's preparation runs beside another's kernels."""


def _milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    for _ in range(QUEUED):
        step()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after)) / QUEUED


def _launches(step: Callable[[], Any], device: torch.device) -> int | None:
    """CUDA kernels of one step; None without CUDA, where the step is taken all the same."""
    if device.type != "cuda":
        step()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        torch.cuda.synchronize(device)
    kernels = [
        one
        for one in seen.events()
        if one.device_type == torch.autograd.DeviceType.CUDA
        and not one.is_user_annotation
        and not one.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels)


def measure(
    competitors: Sequence[Competitor], part: Part, tensors: Tensors, device: torch.device, repeats: int
) -> Measured:
    """Step every competitor `repeats` times, in turns of one step; in turns of several if memory is short.

    Args:
        competitors: who; the first is the baseline.
        part, tensors: what the rank holds, as data and allocated.
        device: where.
        repeats: timed steps of each.
    """
    copy = Result("copy_")
    lanes = [_Lane(copy, lambda: _Copy(device), device)]
    for one in competitors:
        result = Result(one.name, one.version)
        named = tensors.sharded if one.sharded else tensors.local
        lane = _Lane(result, partial(one.build, named, part), device)
        with _Told(lane):
            if not one.installed():
                result.status = "not installed"
        lanes.append(lane)
    with _current(device), _no_collection():
        short = _prepare_all(lanes, part, device)
        if not short:
            each = f"{QUEUED} steps in a row" if device.type == "cuda" else "one step"
            turns = f"all states held at once, {repeats} rounds of {each} each"
            for number in range(repeats):
                for lane in _rotated(lanes, number):
                    lane.step()
        else:
            turns = _in_blocks(lanes, repeats, device, short)
    return Measured([lane.result for lane in lanes[1:]], copy, COPY_BYTES[device.type], turns)


def _prepare_all(lanes: Sequence[_Lane], part: Part, device: torch.device) -> str:
    """Prepare all lanes; if memory falls short on the way release them, and say so."""
    for lane in lanes:
        free = bytes_free(device)
        if free is not None and free < _largest_state(part):
            for one in lanes:
                one.release()
            return f"{free / 2**30:.1f} GiB were left before {lane.result.name}"
        lane.prepare()
    return ""


def _in_blocks(lanes: Sequence[_Lane], repeats: int, device: torch.device, short: str) -> str:
    """Only one state at a time: several rounds in which each competitor starts anew and takes several steps."""
    rounds = min(BLOCK_ROUNDS, repeats)
    for lane in lanes:
        lane.result.ms.clear()
    for number in range(rounds):
        for lane in _rotated(lanes, number):
            bytes_free(device)  # returns what was released to the device
            lane.prepare()
            for _ in range(repeats // rounds + (number < repeats % rounds)):
                lane.step()
            lane.release()
    return f"memory holds too few states at once ({short}): one at a time, {rounds} rounds, {repeats} steps in all"


def _rotated(lanes: Sequence[_Lane], number: int) -> list[_Lane]:
    """Another one begins in every round, so that nobody always finds the caches that the same neighbour left."""
    shift = number % len(lanes)
    return [*lanes[shift:], *lanes[:shift]]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _no_collection(AbstractContextManager[None]):
    """No garbage collection by itself inside a timed step."""

    def __enter__(self) -> None:
        self._was = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was:
            gc.enable()
