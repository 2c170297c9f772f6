"""What c10d sees of a step on real parallelised decoders: how many collectives, among whom, and that it never grows.

Start-up: one MAX of two numbers per group checks the plan; one more per group that holds copies of parameters agrees,
at the first step, on whose gradients are Partial. Then per step one all-reduce of Partial gradients per group where
there are any, and one of sums per group where blocks straddle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import Collectives
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import CASES, Call, Training

from titan_adam_mini import AdamMini

# Per mesh: the axes of the collectives of building, of the first step, and of every later step, in order.
EXPECTED: dict[str, tuple[list[str], list[str], list[str]]] = {
    "FSDP2 1": ([], [], []),
    "FSDP2 3": (["dp"], ["dp"], ["dp"]),
    "HSDP 2x2": (["rep", "dp"], ["rep", "dp"], ["dp"]),
    "TP 2": (["tp"], ["tp", "tp", "tp"], ["tp", "tp"]),
    "TP 2, plain norms": (["tp"], ["tp"], ["tp"]),
    "FSDP2 x TP 2x2": (["dp", "tp"], ["tp", "dp", "tp"], ["dp", "tp"]),
    "FSDP2 x TP 2x2, norms on dp": (["dp", "tp"], ["dp", "tp"], ["dp", "tp"]),
    "HSDP x TP 2x2x2": (["rep", "dp", "tp"], ["rep", "tp", "dp", "tp"], ["dp", "tp"]),
    "MoE, EP 2": (["ep"], [], []),
    "PP 2": ([], [], []),
    "PP x FSDP2 2x2": (["dp"], ["dp"], ["dp"]),
}


def recorded(rank: int, world: int, name: str, layers: int, groups: int) -> list[list[Call]]:
    """The collectives of building, of the first step and of the second, on one rank; groups named by mesh axis."""
    case = CASES[name]
    training = Training(replace(case, sizes=replace(case.sizes, layers=layers)))
    if groups != len(training.optimizer.param_groups):
        pairs = list(training.params.items())
        cut = [{"params": pairs[start::groups], "lr": 1e-2 * (1 + start)} for start in range(groups)]
        training.optimizer = AdamMini(cut, head_dim=case.sizes.head_dim)
    axes = {
        tuple(torch.distributed.get_process_group_ranks(training.mesh.get_group(axis))): axis for axis, _ in case.axes
    }
    calls = []
    for step in range(-1, 2):
        if step >= 0:
            training.backward(step)
        with Collectives() as seen:
            training.optimizer.init_state() if step < 0 else training.optimizer.step()
        calls.append([(one.op.rstrip("_"), axes[one.ranks], one.numel) for one in seen.list])
    return calls


FAST = {"TP 2", "MoE, EP 2"}
NIGHT = {"HSDP x TP 2x2x2", "FSDP2 x TP 2x2, norms on dp"}


def marked(name: str) -> Any:
    marks = () if name in FAST else pytest.mark.nightly if name in NIGHT else pytest.mark.slow
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in EXPECTED])
def test_the_stated_collectives_whatever_the_depth_and_the_groups(name: str) -> None:
    sizes = []
    for layers, groups in ((2, 1), (2, 3), (6, 3)):
        results = run(recorded, CASES[name].world, name, layers, groups)
        for calls in results:
            assert all(op == "allreduce" for phase in calls for op, _, _ in phase)
            assert tuple([axis for _, axis, _ in phase] for phase in calls) == EXPECTED[name], calls
            assert all(numel == 2 for _, _, numel in calls[0]), "the check of the plan is two numbers"
        sizes.append(sum(numel for _, _, numel in results[0][2]))
    assert sizes[0] == sizes[1] and (sizes[2] > 2 * sizes[0] or not EXPECTED[name][2]), "one buffer, that grows"


def order(rank: int, world: int) -> list[str]:
    """What one step does, in order, on a mesh that cuts a head and no row."""
    mesh = init_device_mesh("cpu", (world,))
    shapes = {"wq.weight": (3 * 4, 5), "w1.weight": (8, 5)}
    params = {
        name: torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
        for name, shape in shapes.items()
    }
    optimizer = AdamMini(params.items(), n_heads=3)
    optimizer.init_state()
    done: list[str] = []
    engine, exchange = optimizer.engine, optimizer._exchange
    update, square_sums, finish, all_reduce = engine.update, engine.square_sums, exchange.finish, dist.all_reduce

    def told(words: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names = [work.name for work in args[0]] if args and isinstance(args[0], list) else []
            done.append(" ".join([words, *names]))
            return function(*args, **kwargs)

        return call

    engine.update, engine.square_sums = told("update", update), told("sums", square_sums)
    exchange.finish, dist.all_reduce = told("wait", finish), told("send", all_reduce)
    try:
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return done


def test_other_blocks_are_updated_while_the_sums_travel() -> None:
    want = ["sums wq.weight", "send", "update w1.weight", "wait", "update wq.weight"]
    assert run(order, 2) == [want, want]


def nothing_straddles(rank: int, world: int) -> list[int]:
    """Heads, rows and experts whole on their rank, and copies of a norm."""
    mesh = init_device_mesh("cpu", (world,))
    shapes = {"wq.weight": (6 * 4, 5), "wv.weight": (7, 5), "experts.w1": (4, 3, 5), "q.bias": (9,)}
    params = {}
    for name, shape in shapes.items():
        params[name] = torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
    params["norm.weight"] = torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
    optimizer = AdamMini(params.items(), n_heads=6)
    counts = []
    for _ in range(3):
        for param in params.values():
            param.grad = torch.ones_like(param)
        with Collectives() as seen:
            optimizer.step()
        counts.append(len(seen.list))
    return counts


def test_none_where_nothing_straddles() -> None:
    """At the first step the check of the plan, and the question whose gradients are Partial; then silence."""
    for counts in run(nothing_straddles, 2) + run(nothing_straddles, 3):
        assert counts == [2, 0, 0]
