"""Engines played without an optimizer and without process groups: parameters with layouts, one rank or several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from titan_adam_mini.kernels import Engine, Factor, ParamStep, int8, reference, rounding, vectorized
from titan_adam_mini.kernels.cpu import CpuEngine
from titan_adam_mini.kernels.tensorwise import Tensorwise
from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition.roles import factors
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part
from titan_adam_mini.sharding import box_shape

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
"""By name; those that begin with "factored" have second moments of columns and of the whole beside them."""


def reference_engine() -> Tensorwise:
    return Tensorwise("for-loop", reference)


def engine_of(name: str) -> Engine:
    """A new engine. One for another device joins here, and in ENGINES."""
    plain = Tensorwise("foreach", vectorized)
    return plain if name == "foreach" else CpuEngine(plain)


ENGINES = ["foreach", "cpu"]


class Played:
    """Parameters with state, whole (one rank) or this rank's part along dim 0 of `ranks`.

    Attributes:
        works: one per layout.
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
        store: Any = torch.clone,
    ) -> None:
        self.engine, self.dtype, self.store = engine, dtype, store
        generator = torch.Generator().manual_seed(0)
        groups = groups or [GROUP]
        self.works = []
        for number, (name, layout) in enumerate(layouts.items()):
            full = torch.randn(layout.shape, generator=generator).to(dtype)
            places = [Shard(0)] if layout.shape else []
            part = Part.of(layout.shape, places, (ranks,), (rank,))
            plan = BlockPlan.of(layout, part)
            param = store(own(plan, full))
            wanted = momentum or dtype
            if wanted == torch.int8 and not int8.fits(layout.shape):
                wanted = torch.float32
            precision = torch.float64 if dtype == torch.float64 else torch.float32
            scale = torch.zeros(int8.scale_shape(param.shape)) if wanted == torch.int8 else None
            work = ParamStep(
                name=name,
                plan=plan,
                param=param,
                grad=None,
                exp_avg=torch.zeros_like(param, dtype=wanted),
                exp_avg_scale=scale,
                exp_avg_sq=torch.zeros(plan.grid_shape, dtype=precision),
                step=torch.zeros(()),
                group=groups[number % len(groups)],
                decay=number % 3 != 2,
                seed=None if seed is None else rounding.seed_of(seed, name),
            )
            if name.startswith("factored"):
                plans = [BlockPlan.of(factor, part) for factor in factors(layout.shape)]
                work.factors = tuple(Factor(one, torch.zeros(one.grid_shape, dtype=precision)) for one in plans)
            for grid in (work, *work.factors):
                if grid.plan.axes:
                    kind = torch.float64 if grid.plan.of_columns else precision
                    grid.own_sums, grid.sums = (torch.zeros(grid.plan.sums_shape, dtype=kind) for _ in range(2))
            work.present = torch.zeros(()) if ranks > 1 and layout.shape else None
            self.works.append(work)

    def give(self, grads: dict[str, Tensor | None]) -> None:
        """This step's gradients, whole; a rank takes its part."""
        for work in self.works:
            grad = grads[work.name]
            work.grad = None if grad is None else self.store(own(work.plan, grad))

    def named(self, name: str) -> ParamStep:
        return next(work for work in self.works if work.name == name)


def own(plan: BlockPlan, full: Tensor) -> Tensor:
    """This rank's part of a whole tensor."""
    return full[tuple(slice(*interval) for interval in plan.own[0])]


def gradients(layouts: dict[str, BlockLayout], number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of one step, of different size in every row."""
    generator = torch.Generator().manual_seed(100 + number)
    grads = {}
    for name, layout in layouts.items():
        grad = torch.randn(layout.shape, generator=generator) * 0.1
        if grad.ndim:
            grad *= torch.rand(grad.shape[0], generator=generator).view(-1, *[1] * (grad.ndim - 1)) * 10
        grads[name] = grad.to(dtype)
    return grads


def step(players: Iterable[Played]) -> None:
    """One step of all ranks of a world, the exchange done by hand."""
    players = list(players)
    for played in players:
        for grid in (grid for work in played.works for grid in (work, *work.factors)):
            if grid.own_sums is not None:
                grid.own_sums.zero_()
        played.engine.square_sums([w for w in played.works if w.waits and w.grad is not None and w.grad.numel()])
    for index, _ in enumerate(players[0].works):
        same = [played.works[index] for played in players]
        here = sum(work.grad is not None for work in same)
        for work in same:
            if work.present is not None:
                work.present.fill_(here)
        for ranks in zip(*((work, *work.factors) for work in same), strict=True):
            for grid in ranks:
                if grid.sums is not None:
                    grid.sums.copy_(sum(other.own_sums for other in ranks))
    for played in players:
        played.engine.update([w for w in played.works if w.grad is not None and not w.waits])
        played.engine.update([w for w in played.works if w.waits or (w.grad is None and w.present is not None)])
        for work in played.works:
            work.squares = None


def whole(players: list[Played], index: int, kind: str) -> Tensor:
    """`param` or `exp_avg` of all ranks put together."""
    works = [played.works[index] for played in players]
    parts = [getattr(work, kind) for work in works if not work.plan.layout.shape or work.param.numel()]
    if not parts or not works[0].plan.layout.shape:
        return getattr(works[0], kind)
    assert sum(part.shape[0] for part in parts) == works[0].plan.layout.shape[0]
    return torch.cat(parts)


def reach_of(grid: ParamStep | Factor, whole: Tensor) -> Tensor:
    """The part of a whole grid that a rank keeps."""
    plan = grid.plan
    assert box_shape(plan.reach) == tuple(one.size for one in plan.reach_tiles)
    spans = [one.span(*interval) for one, interval in zip(plan.layout.dims, plan.reach, strict=True)]
    return whole[tuple(slice(*span) for span in spans)]
