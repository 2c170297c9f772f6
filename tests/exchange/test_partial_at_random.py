"""Partial gradients missing on any ranks in any step, on meshes with two and three replicated axes: nobody hangs, and
every replica makes the step of one device with the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from titan_adam_mini import AdamMini

SHAPES = {"layers.0.wq.weight": (6, 5), "layers.0.norm.weight": (7,), "layers.1.norm.weight": (3,)}
STEPS = 6
Pattern = list[list[dict[str, bool]]]
"""[step][rank][name]: has the rank the gradient?"""


def pattern(world: int, seed: int) -> Pattern:
    """Rare at first: what the ranks know of the gradients then grows over several steps."""
    generator = torch.Generator().manual_seed(seed)
    chances = [0.0 if step % 4 == 3 else 1.2 / world if step < 3 else 0.5 for step in range(STEPS)]
    return [
        [{name: torch.rand((), generator=generator).item() < chance for name in SHAPES} for _ in range(world)]
        for chance in chances
    ]


def gradient(name: str, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def make(params: dict[str, torch.nn.Parameter]) -> AdamMini:
    return AdamMini(params.items(), lr=0.1, n_heads=3)


def start() -> dict[str, Tensor]:
    return {
        name: torch.linspace(-1, 1, torch.Size(shape).numel()).double().view(shape) for name, shape in SHAPES.items()
    }


def train(rank: int, world: int, sizes: tuple[int, ...], there: Pattern, op: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", sizes)
    everywhere: list[Placement] = [Replicate() for _ in sizes]
    params = {
        name: torch.nn.Parameter(DTensor.from_local(value, mesh, everywhere, run_check=False))
        for name, value in start().items()
    }
    optimizer = make(params)
    for step in range(STEPS):
        for name, param in params.items():
            local = gradient(name, step, rank)
            parts = [Partial(op) for _ in sizes]
            whole = DTensor.from_local(local, mesh, parts, run_check=False)
            param.grad = whole if there[step][rank][name] else None
        optimizer.step()
    return {name: param.detach().to_local() for name, param in params.items()}


def expected(there: Pattern, op: str) -> dict[str, Tensor]:
    world = len(there[0])
    params = {name: torch.nn.Parameter(value) for name, value in start().items()}
    optimizer = make(params)
    for step in range(STEPS):
        for name, param in params.items():
            parts = [gradient(name, step, rank) for rank in range(world) if there[step][rank][name]]
            total = sum(parts, torch.zeros(SHAPES[name], dtype=torch.float64))
            param.grad = total / (world if op == "avg" else 1) if parts else None
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 2, 2)], ids=str)
def test_every_replica_makes_the_step_of_one_device(sizes: tuple[int, ...], op: str) -> None:
    world = torch.Size(sizes).numel()
    for seed in range(3):
        there = pattern(world, seed)
        want = expected(there, op)
        for rank, got in enumerate(run(train, world, sizes, there, op, timeout=60)):
            for name, value in want.items():
                assert torch.allclose(got[name], value, rtol=0, atol=1e-12), (seed, rank, name)


def test_a_first_gradient_on_one_rank_alone() -> None:
    """Three ranks learn in the first step that the gradient is Partial, the fourth along the other axis only."""
    there: Pattern = [[dict.fromkeys(SHAPES, step > 0 or rank == 0) for rank in range(4)] for step in range(STEPS)]
    want = expected(there, "sum")
    for got in run(train, 4, (2, 2), there, "sum", timeout=60):
        assert all(torch.allclose(got[name], value, rtol=0, atol=1e-12) for name, value in want.items())


def in_bfloat16(rank: int, world: int) -> Any:
    """256 + 1 + 1 is 256 when it is added in bfloat16, and 258 in float32."""
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(DTensor.from_local(torch.zeros(4, dtype=torch.bfloat16), mesh, [Replicate()]))
    optimizer = AdamMini([("norm.weight", param)])
    part = torch.full((4,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    param.grad = DTensor.from_local(part, mesh, [Partial()])
    optimizer.step()
    return float(optimizer.state[param]["exp_avg_sq"].to_local())


def test_gradients_of_bfloat16_are_added_in_float32() -> None:
    assert run(in_bfloat16, 3, timeout=60) == [pytest.approx(258.0**2 * 1e-3)] * 3
