"""The fused engine without an optimizer: compared with the reference kernel, and several ranks with one.

Small tensors of every kind of layout, with every momentum dtype and every second moment: the layouts include blocks,
channels and factored. On a CPU, the compiled CPU engine.
"""

import importlib.util
import traceback
from typing import Any, NamedTuple

import torch

from ...layout import BlockLayout
from ..engines import (
    CPU_FALLBACKS,
    LAYOUTS,
    ROWS,
    TRITON_FALLBACKS,
    SimulatedRank,
    differences,
    differing_bits,
    engine_of,
    gradients,
    reference_engine,
    step,
    world,
)
from ..stage import Context, Result, Skip

STEPS = 3
MISSING = ("rows", "columns", "factored")
"""Layouts without a gradient in the second step."""
RANKS = (2, 3, 5)
LEAST = 5.0
"""Minimum of remaining seconds to begin another case."""


class Case(NamedTuple):
    """Dtypes of parameters, momentum (None: the parameters' dtype) and gradients, and the seed of stochastic
    rounding."""

    name: str
    param: torch.dtype = torch.float32
    momentum: torch.dtype | None = None
    grad: torch.dtype = torch.float32
    seed: int | None = None


Layouts = dict[str, BlockLayout]
BF16 = torch.bfloat16
CASES = (
    Case("fp32"),
    Case("fp32, bf16 momentum", momentum=BF16),
    Case("fp32, int8 momentum", momentum=torch.int8),
    Case("fp32, bf16 gradients", grad=BF16),
    Case("bf16", BF16, None, BF16),
    Case("bf16, fp32 momentum", BF16, torch.float32, BF16),
    Case("bf16, int8 momentum", BF16, torch.int8, BF16),
    Case("bf16, rounded at random", BF16, None, BF16, seed=7),
    Case("bf16, rounded at random, int8 momentum", BF16, torch.int8, BF16, seed=7),
)


LARGE = ("norm", "bias", "elements", "long rows", "large heads")
"""Layouts for which the reference is slow on a CPU."""


def run(context: Context) -> Result:
    """Passes if nothing differs from the reference, and several ranks are bit-identical to one."""
    if not context.cuda and importlib.util.find_spec("numba") is None:
        raise Skip("numba is not installed; the fused CPU engine needs it")
    device = context.of_rank(0)
    engine, left = ("triton", TRITON_FALLBACKS) if context.cuda else ("cpu", CPU_FALLBACKS)
    if context.cuda:
        torch.cuda.set_device(device)
    numbers: dict[str, Any] = {"cases": {}, "ranks": {}}
    layouts = {name: layout for name, layout in LAYOUTS.items() if context.cuda or name not in LARGE}
    for case in CASES if context.cuda else CASES[:3]:
        numbers["cases"][case.name] = _checked(context, against_reference, engine, layouts, case, left, device)
    for case in (CASES[0], CASES[2], CASES[7]) if context.cuda else CASES[:1]:
        numbers["ranks"][case.name] = _checked(context, against_one_rank, engine, layouts, case, device)
    wrong = [f"{name}: {', '.join(faults)}" for part in numbers.values() for name, faults in part.items() if faults]
    what = f"{len(layouts)} layouts, {len(numbers['cases'])} combinations of types"
    line = (
        f"the fused engine equals the reference on {what}; {'/'.join(map(str, RANKS))} ranks are bit-identical to one"
    )
    return Result(not wrong, "; ".join(wrong)[:600] if wrong else line, numbers)


def against_reference(engine: str, layouts: Layouts, case: Case, left: set[str], device: torch.device) -> list[str]:
    """The differences after any of the steps."""
    options: dict[str, Any] = {"dtype": case.param, "momentum": case.momentum, "seed": case.seed, "device": device}
    got, want = (
        SimulatedRank(layouts, engine_of(engine), **options),
        SimulatedRank(layouts, reference_engine(), **options),
    )
    for number in range(STEPS):
        grads: dict[str, Any] = {**gradients(layouts, number, case.grad)}
        if number == 1:
            grads |= dict.fromkeys(MISSING)
        for simulated in (got, want):
            simulated.give(grads)
            step([simulated])
        if faults := differences(got, want, left):
            return [f"step {number + 1}: {fault}" for fault in faults]
    return []


def against_one_rank(engine: str, layouts: Layouts, case: Case, device: torch.device) -> list[str]:
    """What is not bit-identical on several simulated ranks and on one."""
    options: dict[str, Any] = {"dtype": case.param, "momentum": case.momentum, "seed": case.seed, "device": device}
    rows = {name: layout for name, layout in ROWS.items() if name in layouts}
    (one,) = world(engine, 1, layouts=rows, **options)
    found = {ranks: differing_bits(world(engine, ranks, layouts=rows, **options), one) for ranks in RANKS}
    return [f"{ranks} ranks: {fault}" for ranks, faults in found.items() for fault in faults]


def _checked(context: Context, function: Any, *args: Any) -> list[str]:
    if context.left < LEAST:
        return ["no time left"]
    try:
        return [*function(*args)]
    except Exception as error:
        traceback.print_exc()
        return [f"{type(error).__name__}: {error}"[:200]]
