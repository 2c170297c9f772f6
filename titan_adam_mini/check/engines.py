"""Engines without an optimizer and without process groups, compared with the reference kernel.

Parameters with layouts of every kind, on one or on several simulated ranks, whose exchange is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from ..kernels import Engine, Factor, ParamStep, int8, reference, rounding, vectorized
from ..kernels.compiled import Compiled
from ..kernels.cpu import CpuEngine
from ..kernels.tensorwise import Tensorwise
from ..layout import BlockLayout
from ..partition.roles import factors
from ..plan import BlockPlan
from ..sharding import Shard as Part
from ..sharding import box_shape

GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}

LAYOUTS = {
    "scalar": BlockLayout.of(()),
    "norm": BlockLayout.of((5003,), None),
    "bias": BlockLayout.of((133,), 1),
    "rows": BlockLayout.of((37, 129), 1, None),
    "one row": BlockLayout.of((1, 517), 1, None),
    "one column": BlockLayout.of((131, 1), 1, None),
    "long rows": BlockLayout.of((3, 100_003), 1, None),
    "no rows": BlockLayout.of((0, 5), 1, None),
    "no columns": BlockLayout.of((5, 0), 1, None),
    "heads": BlockLayout.of((40, 256), 8, None),
    "large heads": BlockLayout.of((260, 1024), 130, None),
    "whole": BlockLayout.of((33, 65), None, None),
    "columns": BlockLayout.of((1300, 33), None, 1),
    "heads of columns": BlockLayout.of((33, 40), None, 8),
    "elements": BlockLayout.of((3, 128), 1, 1),
    "fused": BlockLayout.of((24, 128), [(4, 4), (8, 1)], None),
    "fused columns": BlockLayout.of((20, 24), None, [(4, 4), (8, 1)]),
    "experts": BlockLayout.of((3, 5, 128), 1, 1, None),
    "experts, stored [in, out]": BlockLayout.of((3, 40, 5), 1, None, 1),
    "whole experts": BlockLayout.of((3, 5, 40), 1, None, None),
    "convolution": BlockLayout.of((6, 3, 2, 2), 1, None, None, None),
    "factored": BlockLayout.of((37, 1200), 1, None),
    "factored experts": BlockLayout.of((3, 5, 128), 1, 1, None),
}
"""Layouts by name; those that begin with "factored" also have second moments of columns and of the full matrix."""

ROWS = {
    name: LAYOUTS[name]
    for names in (
        ("rows", "heads", "norm", "bias", "fused", "experts", "whole experts", "long rows", "large heads", "whole"),
        ("scalar", "columns", "experts, stored [in, out]", "factored", "factored experts"),
    )
    for name in names
}
"""Layouts that are bit-identical for any number of ranks that cut them between rows."""


def reference_engine() -> Tensorwise:
    return Tensorwise("for-loop", reference)


def engine_of(name: str) -> Engine:
    """A new engine: "foreach", "cpu" or "triton". Add new ones here, and in ENGINES."""
    plain = Tensorwise("foreach", vectorized)
    if name == "triton":
        from ..kernels.triton import TritonEngine

        return TritonEngine(plain)
    return plain if name == "foreach" else CpuEngine(plain)


ENGINES = ["foreach", "cpu"]
"""Engines that run on a CPU."""
CPU_FALLBACKS = {"no columns"}
"""Layouts for which the CPU engine falls back to torch."""
TRITON_FALLBACKS = {"no columns", "elements", "fused columns"}
"""The same for the Triton engine."""


class SimulatedRank:
    """Parameters with state on one simulated rank, sharded along dim 0 over `ranks`.

    Attributes:
        param_steps: one per layout.
    """

    def __init__(
        self,
        layouts: dict[str, BlockLayout],
        engine: Engine,
        *,
        dtype: torch.dtype = torch.float32,
        momentum: torch.dtype | None = None,
        ranks: int = 1,
        rank: int = 0,
        seed: int | None = None,
        groups: list[dict[str, Any]] | None = None,
        store: Callable[[Tensor], Tensor] = torch.clone,
        device: str | torch.device = "cpu",
    ) -> None:
        self.engine, self.dtype, self.store = engine, dtype, store
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        groups = groups or [GROUP]
        self.param_steps = []
        for number, (name, layout) in enumerate(layouts.items()):
            full = torch.randn(layout.shape, generator=generator).to(dtype)
            places = [Shard(0)] if layout.shape else []
            part = Part.of(layout.shape, places, (ranks,), (rank,))
            plan = BlockPlan.of(layout, part)
            param = store(own(plan, full).to(self.device))
            wanted = momentum or dtype
            if wanted == torch.int8 and not int8.fits(layout.shape):
                wanted = torch.float32
            precision = torch.float64 if dtype == torch.float64 else torch.float32
            scale = self._zeros(int8.scale_shape(param.shape)) if wanted == torch.int8 else None
            param_step = ParamStep(
                name=name,
                plan=plan,
                param=param,
                grad=None,
                exp_avg=torch.zeros_like(param, dtype=wanted),
                exp_avg_scale=scale,
                exp_avg_sq=self._zeros(plan.grid_shape, precision),
                step=self._zeros(()),
                group=groups[number % len(groups)],
                decay=number % 3 != 2,
                seed=None if seed is None else rounding.seed_of(seed, name),
            )
            if name.startswith("factored"):
                plans = [BlockPlan.of(factor, part) for factor in factors(layout.shape)]
                param_step.factors = tuple(
                    Factor(factor_plan, self._zeros(factor_plan.grid_shape, precision)) for factor_plan in plans
                )
            for grid in _grids(param_step):
                if grid.plan.axes:
                    kind = torch.float64 if grid.plan.of_columns else precision
                    grid.own_sums, grid.sums = (self._zeros(grid.plan.sums_shape, kind) for _ in range(2))
            param_step.present = self._zeros(()) if ranks > 1 and layout.shape else None
            self.param_steps.append(param_step)

    def _zeros(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def give(self, grads: Mapping[str, Tensor | None]) -> None:
        """Set this step's gradients from full ones."""
        for param_step in self.param_steps:
            grad = grads[param_step.name]
            param_step.grad = None if grad is None else self.store(own(param_step.plan, grad).to(self.device))

    def named(self, name: str) -> ParamStep:
        return next(param_step for param_step in self.param_steps if param_step.name == name)


def _grids(param_step: ParamStep) -> tuple[ParamStep | Factor, ...]:
    """A parameter's grids of second moments: its own, and those of its columns and of the full matrix."""
    return (param_step, *param_step.factors)


def own(plan: BlockPlan, full: Tensor) -> Tensor:
    """This rank's part of a full tensor."""
    return full[tuple(slice(*interval) for interval in plan.own[0])]


def gradients(layouts: dict[str, BlockLayout], number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of one step, with a different scale in every row."""
    generator = torch.Generator().manual_seed(100 + number)
    grads = {}
    for name, layout in layouts.items():
        grad = torch.randn(layout.shape, generator=generator) * 0.1
        if grad.ndim:
            grad *= torch.rand(grad.shape[0], generator=generator).view(-1, *[1] * (grad.ndim - 1)) * 10
        grads[name] = grad.to(dtype)
    return grads


def step(simulated_ranks: Iterable[SimulatedRank]) -> None:
    """One step of all simulated ranks, including the exchange."""
    simulated_ranks = list(simulated_ranks)
    for simulated in simulated_ranks:
        for grid in (grid for param_step in simulated.param_steps for grid in _grids(param_step)):
            if grid.own_sums is not None:
                grid.own_sums.zero_()
        simulated.engine.square_sums(
            [w for w in simulated.param_steps if w.waits and w.grad is not None and w.grad.numel()]
        )
    for index, _ in enumerate(simulated_ranks[0].param_steps):
        same = [simulated.param_steps[index] for simulated in simulated_ranks]
        here = sum(param_step.grad is not None for param_step in same)
        for param_step in same:
            if param_step.present is not None:
                param_step.present.fill_(here)
        for ranks in zip(*(_grids(param_step) for param_step in same), strict=True):
            for grid in ranks:
                if grid.sums is not None:
                    grid.sums.copy_(sum(other.own_sums for other in ranks))
    for simulated in simulated_ranks:
        simulated.engine.update([w for w in simulated.param_steps if w.grad is not None and not w.waits])
        simulated.engine.update(
            [w for w in simulated.param_steps if w.waits or (w.grad is None and w.present is not None)]
        )
        for param_step in simulated.param_steps:
            param_step.squares = None


def gathered(simulated_ranks: list[SimulatedRank], index: int, kind: str) -> Tensor:
    """The full `param` or `exp_avg`, from all ranks."""
    param_steps = [simulated.param_steps[index] for simulated in simulated_ranks]
    parts = [
        getattr(param_step, kind)
        for param_step in param_steps
        if not param_step.plan.layout.shape or param_step.param.numel()
    ]
    if not parts or not param_steps[0].plan.layout.shape:
        return getattr(param_steps[0], kind)
    assert sum(part.shape[0] for part in parts) == param_steps[0].plan.layout.shape[0]
    return torch.cat(parts)


def reach_of(grid: ParamStep | Factor, full_grid: Tensor) -> Tensor:
    """The part of a full grid that a rank stores."""
    plan = grid.plan
    assert box_shape(plan.reach) == tuple(tiles.size for tiles in plan.reach_tiles)
    spans = [tiles.span(*interval) for tiles, interval in zip(plan.layout.dims, plan.reach, strict=True)]
    return full_grid[tuple(slice(*span) for span in spans)]


def differences(got: SimulatedRank, want: SimulatedRank, fallbacks: set[str] = CPU_FALLBACKS) -> list[str]:
    """Descriptions of differences between an engine's result and the reference; empty if there are none.

    Elementwise operations are bit-identical on a CPU. Sums of a compiled engine may differ in the last bits, and then a
    few values may be rounded differently. On a GPU, whose compilers fuse multiplications with additions, momentum may
    differ too.

    Args:
        got: parameters updated by the engine.
        want: the same parameters after the same steps of the reference.
        fallbacks: layouts for which a compiled engine may fall back to torch.
    """
    compiled, cuda = isinstance(got.engine, Compiled), got.device.type == "cuda"
    found = []
    if isinstance(got.engine, Compiled) and (more := set(got.engine._fallbacks) - fallbacks):
        found.append(f"fell back to torch: {', '.join(sorted(more))}")
    for mine, other in zip(got.param_steps, want.param_steps, strict=True):
        few = 2 + mine.param.numel() // 500
        double = mine.exp_avg_sq.dtype == torch.float64
        tight = 0.0 if not compiled else 1e-13 if double else 1e-6
        wrong = []
        if _apart(mine.step, other.step):
            wrong.append("step")
        grids = zip(_grids(mine), _grids(other), strict=True)
        if any(_apart(one.exp_avg_sq, two.exp_avg_sq, tight * (3 if cuda else 1)) for one, two in grids):
            wrong.append("second moments")
        if cuda:
            one, two = _momentum(mine), _momentum(other)
            largest = float(two.abs().max()) if two.numel() else 0.0
            if _apart(one, two, 0.0, 1e-6 * largest) > few:
                wrong.append("momentum")
        elif _apart(mine.exp_avg, other.exp_avg) or (
            mine.exp_avg_scale is not None
            and other.exp_avg_scale is not None
            and _apart(mine.exp_avg_scale, other.exp_avg_scale)
        ):
            wrong.append("momentum")
        if mine.param.dtype == torch.bfloat16 and compiled:
            near = _apart(mine.param, other.param) <= few and not _apart(mine.param, other.param, 2**-7, 2**-7 * 0.1)
        elif cuda and mine.exp_avg.element_size() < 4:
            near = _apart(mine.param, other.param, tight, tight) <= few and not _apart(mine.param, other.param, 0, 1e-3)
        else:
            near = not _apart(mine.param, other.param, tight, tight if cuda else tight * 0.1)
        found += [f"{mine.name}: {what}" for what in (*wrong, *([] if near else ["values"]))]
    return found


def _apart(one: Tensor, two: Tensor, relative: float = 0.0, absolute: float = 0.0) -> int:
    """Number of elements that differ by more than the tolerances; NaN equals only NaN."""
    one, two = one.double(), two.double()
    near = (one == two) | (one.isnan() & two.isnan()) | ((one - two).abs() <= absolute + relative * two.abs())
    return int((~near).sum())


def _momentum(param_step: ParamStep) -> Tensor:
    """Momentum as float32; int8 is dequantised."""
    values = param_step.exp_avg.float()
    return (
        values
        if param_step.exp_avg_scale is None
        else values * param_step.exp_avg_scale.repeat_interleave(int8.RUN, -1)
    )


def world(
    engine: str,
    ranks: int,
    steps: int = 3,
    without: int | None = None,
    layouts: dict[str, BlockLayout] = ROWS,
    **options: Any,
) -> list[SimulatedRank]:
    """All simulated ranks after some steps; rank `without` has no gradients in the second step."""
    simulated_ranks = [
        SimulatedRank(layouts, engine_of(engine), ranks=ranks, rank=rank, **options) for rank in range(ranks)
    ]
    dtype = options.get("dtype", torch.float32)
    for number in range(steps):
        grads = gradients(layouts, number, dtype)
        for rank, simulated in enumerate(simulated_ranks):
            simulated.give(dict.fromkeys(layouts) if number == 1 and rank == without else grads)
        step(simulated_ranks)
    return simulated_ranks


def differing_bits(ranks: list[SimulatedRank], one: SimulatedRank) -> list[str]:
    """Parameters and moments that are not bit-identical on several ranks and on one."""
    found = []
    for index, param_step in enumerate(one.param_steps):
        if param_step.by_columns and param_step.param.dtype == torch.float64:
            continue  # float64 squares are not rounded before they are added
        found += [
            f"{param_step.name}: {kind}"
            for kind in ("param", "exp_avg")
            if not torch.equal(gathered(ranks, index, kind), getattr(param_step, kind))
        ]
        for simulated in ranks:
            mine = simulated.param_steps[index]
            grids = zip(_grids(mine), _grids(param_step), strict=True)
            if not all(torch.equal(grid.exp_avg_sq, reach_of(grid, other.exp_avg_sq)) for grid, other in grids):
                found.append(f"{param_step.name}: exp_avg_sq")
            if float(mine.step) != float(param_step.step):
                found.append(f"{param_step.name}: step")
    return found
