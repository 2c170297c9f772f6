"""Twenty steps on the 291 tensors of a Llama: no synchronisation, no allocation, no new kernel, few launches.

The learning rate follows a schedule; gradients do not change. Fused AdamW is measured for comparison.
"""

import contextlib
import math
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ..stage import Context, Result, engine_of, need_cuda
from ..tensors import THREE, VARIANTS, Variant, adam_mini, parameters
from .trace import Trace, traced

WARM_UP, STEPS = 2, 20
COUNTED = ("num_alloc_retries", "segment.all.allocated", "allocation.all.allocated")
TRACED = 2


def run(context: Context) -> Result:
    """All variants of AdamMini must pass; AdamW is only reported."""
    need_cuda(context, "this")
    device = context.of_rank(0)
    torch.cuda.set_device(device)
    numbers: dict[str, Any] = {}
    wrong: list[str] = []
    for variant in VARIANTS:
        if context.left < 15:
            wrong.append(f"no time left for {variant.name}")
            continue
        try:
            numbers[variant.name] = measure(device, variant, adamw=False)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{variant.name}: {type(error).__name__}: {error}"[:200])
            continue
        wrong += [f"{variant.name}: {fault}" for fault in faults(numbers[variant.name])]
    adamw = measure(device, VARIANTS[0], adamw=True)
    if VARIANTS[0].name not in numbers:
        return Result(False, "; ".join(wrong), numbers)
    first = numbers[VARIANTS[0].name]
    what = (
        f"AdamMini {first['kernels']:g} kernels and {first['copies']:g} copies per step for 291 tensors, "
        f"{first['kernels_of_three']:g} for 3; AdamW fused {adamw['kernels']:g} and {adamw['copies']:g}, "
        f"{adamw['kernels_of_three']:g} for 3; {len(numbers)} variants"
    )
    numbers["AdamW fused, fp32"] = adamw
    outcome = "; ".join(wrong) if wrong else "no synchronisation, allocation or new kernel in 20 steps"
    return Result(not wrong, f"{outcome}; {what}", numbers)


def faults(one: dict[str, Any]) -> list[str]:
    """Descriptions of all faults."""
    found = [f"error {one['error']}"] if one["error"] else []
    found += [f"{name} grew by {grown}" for name, grown in one["grown"].items() if grown]
    if one["compiled"]:
        found.append(f"{one['compiled']} kernels compiled after the warm-up")
    if one["kernels"] != one["kernels_of_three"]:
        found.append(f"{one['kernels_of_three']:g} kernels for 3 tensors, {one['kernels']:g} for 291")
    if one["waits"]:
        found.append(f"waits: {', '.join(one['waits'])}")
    if not one["kernels"] or not one["calls"]:
        found.append("the profiler saw no kernel or no launch")
    return found


def measure(device: torch.device, variant: Variant, adamw: bool) -> dict[str, Any]:
    """Measurements of one optimizer."""
    many, params = optimizer_of(device, variant, adamw)
    few, _ = optimizer_of(device, variant, adamw, THREE)
    one: dict[str, Any] = {"engine": "AdamW" if adamw else engine_of(many, cuda=True), "error": ""}
    with compilations() as compiled:
        for step in range(WARM_UP):
            schedule(many, step)
            many.step()
        torch.cuda.synchronize()
        before, known = counters(device), len(compiled)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(WARM_UP, WARM_UP + STEPS):
                schedule(many, step)
                many.step()
        except RuntimeError as error:
            one["error"] = str(error).strip().splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        one["grown"] = {name: value - before[name] for name, value in counters(device).items()}
        one["compiled"] = len(compiled) - known
    trace = steps_of(many)
    one["kernels"], one["copies"] = count(trace)
    one["waits"] = trace.waits("check.step")
    one["calls"] = len(trace.calls("check.step")) / TRACED
    one["names"] = sorted({event["name"][:80] for event in trace.work("check.step", "kernel")})
    one["kernels_of_three"], one["copies_of_three"] = count(steps_of(few))
    finite = all(bool(torch.isfinite(param).all()) for param in params.values())
    if not finite and not one["error"]:
        one["error"] = "parameters that are not finite"
    return one


def optimizer_of(
    device: torch.device, variant: Variant, adamw: bool, names: tuple[str, ...] | None = None
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """AdamMini or AdamW, and its parameters."""
    params = parameters(device, variant, names)
    if adamw:
        return torch.optim.AdamW(params.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True), params
    return adam_mini(params, variant), params


def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rate of a step, as a scheduler would."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + math.cos(step / STEPS)) / 2


def steps_of(optimizer: torch.optim.Optimizer) -> Trace:
    """The trace of some steps, after two untraced ones."""
    for step in range(2):
        schedule(optimizer, step)
        optimizer.step()
    moved = iter(range(2, 2 + TRACED))

    def step_once() -> None:
        schedule(optimizer, next(moved))
        optimizer.step()

    return traced(step_once, TRACED, cuda=True)


def count(trace: Trace) -> tuple[float, float]:
    """Kernels, and copies or fills, per step; nothing else runs while it is traced."""
    return trace.device("kernel") / TRACED, trace.device("gpu_memcpy", "gpu_memset") / TRACED


def counters(device: torch.device) -> dict[str, int]:
    """Bytes in use, and the allocator's counters."""
    stats = torch.cuda.memory_stats(device)
    return {"bytes allocated": torch.cuda.memory_allocated(device), **{name: stats.get(name, 0) for name in COUNTED}}


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    """A list that gets an entry whenever triton compiles a kernel."""
    from triton import knobs

    compiled: list[int] = []
    before = knobs.runtime.jit_post_compile_hook

    def hook(*args: Any, **options: Any) -> None:
        compiled.append(1)

    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield compiled
    finally:
        knobs.runtime.jit_post_compile_hook = before
