"""Measures optimizers in turns within one process, on the same parameters and gradients.

All competitors share the parameters, because a step in place does not affect another's time; each has its own state. A
large `copy_` takes turns with them: its bandwidth is the reference for the bytes that a step moves.
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
from .rank_params import RankParams, Tensors

WARM_UP = 3
BLOCK_ROUNDS = 4
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single"),
)


@dataclass
class Result:
    """The result of one competitor.

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
    """All results, that of the copy, and a description of the turns."""

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


def bytes_needed(rank_params: RankParams, device: torch.device) -> int:
    """Memory for parameters, gradients, the largest state (two moments), one temporary, and the copy."""
    return 2 * rank_params.bytes + _largest_state(rank_params) + 2 * COPY_BYTES[device.type]


def _largest_state(rank_params: RankParams) -> int:
    return 3 * sum(param.numel * max(4, param.dtype.itemsize) for param in rank_params.params)


def bytes_free(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device; None if it is unknown."""
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
    """Bytes of all tensors in an optimizer's state on this rank; shared memory is counted once."""
    seen: dict[int, int] = {}
    for tensor in _tensors_in(value):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors_in(value: Any) -> Iterable[Tensor]:
    """The plain tensors inside containers, DTensors, tensor subclasses, and objects with tensors as attributes."""
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
        for item in value:
            yield from _tensors_in(item)
    elif type(value).__module__.split(".")[0] not in ("builtins", "torch") and hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value))


class Collectives(AbstractContextManager["Collectives"]):
    """`with Collectives() as seen: ...` counts the calls of torch.distributed's collectives and their bytes, those of
    the inputs or of the outputs, whichever are more."""

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
        sides = [arg if isinstance(arg, list) else [arg] for arg in (*args, *kwargs.values())]
        self.bytes += max(sum(value.nbytes for value in side if isinstance(value, Tensor)) for side in sides)
        return function(*args, **kwargs)


class _Copy:
    """A copy of memory, with the interface of an optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
        self.target = torch.zeros_like(self.source)

    def step(self) -> None:
        self.target.copy_(self.source)


class _Measurement:
    """The measurement of one competitor: its optimizer, while it has one, and its result."""

    def __init__(self, result: Result, build: Callable[[], Any], device: torch.device) -> None:
        self.result, self._build, self._device = result, build, device
        self.optimizer: Any = None
        self._counted = False

    def prepare(self) -> None:
        """Build and warm up; kernels and collectives of a step are counted once during warm-up, never while timing."""
        if self.result.status != "measured":
            return
        with _RecordFailure(self):
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
            with _RecordFailure(self):
                self.result.ms.append(_milliseconds(self.optimizer.step, self._device))

    def release(self) -> None:
        """Free the state."""
        self.optimizer = None
        gc.collect()


class _RecordFailure(AbstractContextManager["_RecordFailure"]):
    """Records an exception in the result instead of raising it."""

    def __init__(self, measurement: _Measurement) -> None:
        self._measurement = measurement

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._measurement.result.status, self._measurement.result.note = "failed", first_line(error)
        self._measurement.result.ms.clear()
        self._measurement.optimizer = None
        return True


def first_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


QUEUED = 4
"""Steps queued on a GPU in a row, as in training: the host prepares a step while the GPU runs the previous one."""


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
    """The number of CUDA kernels of one step; without CUDA, take the step and return None."""
    if device.type != "cuda":
        step()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels)


def measure(
    competitors: Sequence[Competitor], rank_params: RankParams, tensors: Tensors, device: torch.device, repeats: int
) -> Measured:
    """Step every competitor `repeats` times, in turns of one step, or of several if memory is short.

    Args:
        competitors: the first is the baseline.
        rank_params, tensors: the rank's parameters, as data and allocated.
        device: the device of the tensors.
        repeats: timed steps of each competitor.
    """
    copy = Result("copy_")
    measurements = [_Measurement(copy, lambda: _Copy(device), device)]
    for competitor in competitors:
        result = Result(competitor.name, competitor.version)
        named = tensors.sharded if competitor.sharded else tensors.local
        measurement = _Measurement(result, partial(competitor.build, named, rank_params), device)
        with _RecordFailure(measurement):
            if not competitor.installed():
                result.status = "not installed"
        measurements.append(measurement)
    with _current(device), _no_collection():
        short = _prepare_all(measurements, rank_params, device)
        if not short:
            each = f"{QUEUED} steps in a row" if device.type == "cuda" else "one step"
            turns = f"all states allocated at once, {repeats} rounds of {each} each"
            for number in range(repeats):
                for measurement in _rotated(measurements, number):
                    measurement.step()
        else:
            turns = _one_at_a_time(measurements, repeats, device, short)
    return Measured([measurement.result for measurement in measurements[1:]], copy, COPY_BYTES[device.type], turns)


def _prepare_all(measurements: Sequence[_Measurement], rank_params: RankParams, device: torch.device) -> str:
    """Prepare all measurements; if memory runs short, release them and return a note, else ""."""
    for measurement in measurements:
        free = bytes_free(device)
        if free is not None and free < _largest_state(rank_params):
            for prepared in measurements:
                prepared.release()
            return f"{free / 2**30:.1f} GiB were left before {measurement.result.name}"
        measurement.prepare()
    return ""


def _one_at_a_time(measurements: Sequence[_Measurement], repeats: int, device: torch.device, short: str) -> str:
    """Measure with one state at a time: in several rounds, each competitor is built again and takes several steps."""
    rounds = min(BLOCK_ROUNDS, repeats)
    for measurement in measurements:
        measurement.result.ms.clear()
    for number in range(rounds):
        for measurement in _rotated(measurements, number):
            bytes_free(device)  # returns released memory to the device
            measurement.prepare()
            for _ in range(repeats // rounds + (number < repeats % rounds)):
                measurement.step()
            measurement.release()
    return f"memory fits too few states at once ({short}): one at a time, {rounds} rounds, {repeats} steps in all"


def _rotated(measurements: Sequence[_Measurement], number: int) -> list[_Measurement]:
    """Start each round with another measurement, so that the contents of caches do not favour the same one."""
    shift = number % len(measurements)
    return [*measurements[shift:], *measurements[:shift]]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _no_collection(AbstractContextManager[None]):
    """Disables automatic garbage collection, which would disturb timed steps."""

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()
