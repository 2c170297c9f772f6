"""Any mesh, any placements, any layout, any shape: hypothesis looks for one on which sharding changes the result.

Bare tensors with gradients made by hand. A batch of problems goes through the ranks at once; the oracle runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.layout import BlockLayout, Tiles
from titan_adam_mini.partition import Blocks
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part
from titan_adam_mini.sharding import shard_of

STEPS = 3
LR, DECAY = 0.05, 0.1
MESHES = ((1,), (2,), (3,), (4,), (5,), (6,), (2, 2), (2, 3), (3, 2), (1, 3), (2, 1, 2), (2, 2, 1))
Problem = dict[str, Any]
"""mesh: its shape; foreach: the engine; tensors: a list of {runs, placements, partial, skip}. Built-in types only.

runs: per dim the runs of its tiles, which give its size too. placements: per mesh axis None, (dim,) or
(dim, split factor). partial: the mesh axes along which its gradient is Partial. skip: steps without a gradient.
"""


@st.composite
def runs(draw: Any) -> list[tuple[int, int]]:
    """How one dim is cut: not at all, index by index, evenly, or anyhow."""
    kind = draw(st.sampled_from(("whole", "unit", "even", "fused")))
    if kind == "whole":
        return [(1, draw(st.integers(1, 9)))]
    if kind == "unit":
        return [(draw(st.integers(1, 9)), 1)]
    if kind == "even":
        return [(draw(st.integers(1, 4)), draw(st.integers(2, 4)))]
    return draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 4)), min_size=1, max_size=3))


@st.composite
def tensors(draw: Any, mesh: tuple[int, ...]) -> dict[str, Any]:
    """One tensor on the mesh: plain and strided shards of any dim on any axis, in any order."""
    cuts = draw(st.lists(runs(), max_size=3))
    places: list[tuple[int, ...] | None] = [None] * len(mesh)
    for axis in reversed(range(len(mesh))):
        dim = draw(st.integers(-1, len(cuts) - 1))
        if dim < 0:
            continue
        later = prod(mesh[right] for right in range(axis + 1, len(mesh)) if (places[right] or (-1,))[0] == dim)
        places[axis] = (dim, later) if later > 1 and draw(st.booleans()) else (dim,)
    copies = [axis for axis, place in enumerate(places) if place is None and mesh[axis] > 1]
    partial = draw(st.sets(st.sampled_from(copies))) if copies else set()
    # What is Partial is agreed on at the first step: a gradient that turns up later as Partial is refused in words.
    skip = draw(st.sets(st.integers(1 if partial else 0, STEPS - 1), max_size=1))
    return {"runs": cuts, "placements": places, "partial": sorted(partial), "skip": sorted(skip)}


@st.composite
def problems(draw: Any, world: int) -> Problem:
    """Some tensors, on a mesh of so many ranks."""
    mesh = draw(st.sampled_from([mesh for mesh in MESHES if prod(mesh) == world]))
    return {
        "mesh": mesh,
        "foreach": draw(st.booleans()),
        "tensors": draw(st.lists(tensors(mesh), min_size=1, max_size=4)),
    }


@dataclass(frozen=True)
class AnyLayout(Partition):
    """A partition that takes its layouts as they are given."""

    layouts: tuple[tuple[str, BlockLayout], ...] = ()

    def assign(self, shapes: Any, *, partial: bool = False) -> dict[str, Blocks]:
        known = dict(self.layouts)
        return {name: Blocks(name, tuple(shape), "", known[name], True, name) for name, shape in shapes.items()}


def layouts_of(problem: Problem) -> dict[str, BlockLayout]:
    """The layouts by name."""
    return {
        str(number): BlockLayout(tuple(Tiles.of(cut) for cut in tensor["runs"]))
        for number, tensor in enumerate(problem["tensors"])
    }


def values(problem: Problem, step: int) -> dict[str, Tensor]:
    """Parameters at step -1, gradients later: equal wherever they are made, and of changing size."""
    generator = torch.Generator().manual_seed(step + 1)
    return {
        name: torch.randn(layout.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3)
        for name, layout in layouts_of(problem).items()
    }


def solve(rank: int, world: int, batch: list[Problem]) -> list[list[Any]]:
    """Every problem on the ranks. Per tensor: own box, parameter, momentum, where its blocks stand, v, step."""
    return [solve_one(problem) for problem in batch]


def solve_one(problem: Problem) -> list[Any]:
    mesh = init_device_mesh("cpu", problem["mesh"])
    coordinate = mesh.get_coordinate()
    assert coordinate is not None

    def placed(full: Tensor, places: list[Placement], partial: list[int]) -> DTensor:
        box = Part.of(full.shape, places, mesh.shape, coordinate).box()
        data = full[tuple(slice(*interval) for interval in box)].clone()
        places = list(places)
        for axis in partial:
            size = mesh.size(axis)
            data, places[axis] = data * (2 * (coordinate[axis] + 1) / (size * (size + 1))), Partial()
        return DTensor.from_local(data, mesh, places, run_check=False, shape=full.shape, stride=full.stride())

    layouts = layouts_of(problem)
    params, places = {}, {}
    for (name, full), tensor in zip(values(problem, -1).items(), problem["tensors"], strict=True):
        places[name] = [
            Replicate() if p is None else Shard(*p) if len(p) == 1 else _StridedShard(p[0], split_factor=p[1])
            for p in tensor["placements"]
        ]
        params[name] = torch.nn.Parameter(placed(full, places[name], []))
    optimizer = AdamMini(
        params.items(),
        LR,
        weight_decay=DECAY,
        foreach=problem["foreach"],
        partition=AnyLayout((), layouts=tuple(layouts.items())),
    )
    for step in range(STEPS):
        grads = values(problem, step)
        for (name, param), tensor in zip(params.items(), problem["tensors"], strict=True):
            skipped = step in tensor["skip"]
            param.grad = None if skipped else placed(grads[name], places[name], tensor["partial"])
        optimizer.step()
    result = []
    for name, param in params.items():
        plan = BlockPlan.of(layouts[name], shard_of(param))
        spans = tuple(tiles.span(*there) for tiles, there in zip(layouts[name].dims, plan.reach, strict=True))
        state = optimizer.state[param]
        moments = state["exp_avg"].to_local(), state["exp_avg_sq"].to_local()
        assert tuple(state["exp_avg_sq"].shape) == layouts[name].grid_shape
        result.append((plan.own[0], param.to_local().detach(), moments[0], spans, moments[1], int(state["step"])))
    return result


def expected(problem: Problem) -> Oracle:
    """The same on one device."""
    oracle = Oracle(values(problem, -1), layouts_of(problem))
    for step in range(STEPS):
        skipped = {str(n) for n, tensor in enumerate(problem["tensors"]) if step in tensor["skip"]}
        grads = {name: None if name in skipped else grad for name, grad in values(problem, step).items()}
        oracle.step(grads, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=dict.fromkeys(grads, DECAY))
    return oracle


def cut(full: Tensor, box: Any) -> Tensor:
    return full[tuple(slice(*interval) for interval in box)]


@pytest.mark.parametrize(
    "examples", [4, pytest.param(12, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.nightly)]
)
def test_no_sharding_changes_the_result(examples: int) -> None:
    batches = st.integers(1, 6).flatmap(
        lambda world: st.tuples(st.just(world), st.lists(problems(world), min_size=1, max_size=8))
    )
    run_some = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    run_some(given(batches)(check))()


def check(drawn: tuple[int, list[Problem]]) -> None:
    world, batch = drawn
    answers = run(solve, world, batch)
    for number, problem in enumerate(batch):
        oracle = expected(problem)
        for answer in answers:
            for name, held in zip(oracle.params, answer[number], strict=True):
                box, param, exp_avg, spans, exp_avg_sq, steps = held
                assert steps == oracle.steps[name], (name, problem)
                assert error(param, cut(oracle.params[name], box)) < 1e-12, (name, problem)
                assert error(exp_avg, cut(oracle.exp_avg[name], box)) < 1e-12, (name, problem)
                assert error(exp_avg_sq, cut(oracle.exp_avg_sq[name], spans)) < 1e-12, (name, problem)
