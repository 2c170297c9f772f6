"""Some steps with gradients put there by hand, on any mesh of the catalogue and in the oracle.

Same values, gradients and schedule everywhere: gradients change in size by a hundred from step to step and are
clipped, the learning rate moves, and two parameter groups differ in learning rate, betas and decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from collectives import Collective, Collectives
from meshes import MESHES, whole
from ranks import run
from torch import Tensor

from titan_adam_mini.check.decoder import Sizes
from titan_adam_mini.check.injected import STEPS_TAKEN, full, gradients, make, set_lr, take_step, values
from titan_adam_mini.check.meshes import Placed, full_shapes, local
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.state import SECOND_MOMENTS


def train(
    rank: int, world: int, name: str, kind: str, dtype: torch.dtype, steps: int, options: dict[str, Any]
) -> dict[str, Any]:
    """On one rank: train, and give back what it holds, and the collectives of the first steps and of the last."""
    mesh = MESHES[name]
    placed = Placed.decoder(mesh, dtype).fill(values(full_shapes(mesh.sizes)))
    optimizer = make(kind, placed.params, mesh.sizes, **options)
    seen = []
    for step in range(steps):
        with Collectives() if step in (0, 1, 2, steps - 1) else nullcontext() as collectives:
            take_step(mesh, placed, optimizer, step)
        if collectives is not None:
            seen.append(collectives.list)
    return {**holdings(placed, optimizer), "collectives": seen}


def on_one_device(
    sizes: Sizes, kind: str = "AdamMini", dtype: torch.dtype = torch.float64, steps: int = STEPS_TAKEN, **options: Any
) -> dict[str, dict[str, Any]]:
    """The same on plain tensors in this process."""
    shapes = full_shapes(sizes)
    params = {name: torch.nn.Parameter(value.to(dtype)) for name, value in values(shapes).items()}
    optimizer = make(kind, params, sizes, **options)
    for step in range(steps):
        for name, grad in gradients(shapes, step).items():
            params[name].grad = grad.to(dtype)
        set_lr(optimizer, step)
        optimizer.step()
    state = {name: optimizer.state[param] for name, param in params.items()}
    return {
        "params": {name: param.detach() for name, param in params.items()},
        "exp_avg": {name: momentum_of(one) for name, one in state.items()},
        "step": {name: one["step"] for name, one in state.items()},
        **{key: {name: one[key] for name, one in state.items() if key in one} for key in SECOND_MOMENTS},
    }


def holdings(placed: Placed, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What one rank holds: parts of parameters and momentum, whole second moments, steps."""
    state = {name: optimizer.state[param] for name, param in placed.params.items()}
    return {
        "params": placed.parts(),
        "exp_avg": placed.parts({name: momentum_of(one) for name, one in state.items()}),
        **{key: {name: full(one[key]) for name, one in state.items() if key in one} for key in SECOND_MOMENTS},
        "step": {name: float(one["step"]) for name, one in state.items()},
    }


def momentum_of(state: Mapping[str, Tensor]) -> Tensor:
    """This rank's momentum; of int8, value times scale."""
    values = local(state["exp_avg"]).detach()
    if values.dtype != torch.int8:
        return values
    return values * local(state["exp_avg_scale"]).repeat_interleave(128, -1)


def together(shapes: Mapping[str, tuple[int, ...]], ranks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One set of full tensors from the holdings of all ranks. Asserts that replicas are equal to the bit."""
    return {
        "params": whole(shapes, [one["params"] for one in ranks]),
        "exp_avg": whole(shapes, [one["exp_avg"] for one in ranks]),
        **{key: agreed([one[key] for one in ranks]) for key in SECOND_MOMENTS},
        "step": agreed([one["step"] for one in ranks]),
    }


def agreed(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What every rank that knows a parameter says of it. Asserts that they say the same."""
    said: dict[str, Any] = {}
    for one in ranks:
        for name, value in one.items():
            known = said.setdefault(name, value)
            same = torch.equal(known, value) if isinstance(value, Tensor) else known == value
            assert same, f"ranks differ in {name}"
    return said


def on_mesh(
    name: str, kind: str = "AdamMini", dtype: torch.dtype = torch.float64, steps: int = STEPS_TAKEN, **options: Any
) -> tuple[dict[str, dict[str, Any]], list[list[list[Collective]]]]:
    """`train` on all ranks of a mesh: everything together, and by rank the collectives."""
    mesh = MESHES[name]
    ranks = run(train, mesh.world, name, kind, dtype, steps, options)
    return together(full_shapes(mesh.sizes), ranks), [one["collectives"] for one in ranks]


def errors(got: Mapping[str, Any], want: Oracle) -> dict[str, float]:
    """The largest relative error over all parameters, for parameters and both moments."""
    assert all(got["step"][name] == steps for name, steps in want.steps.items()), got["step"]
    return {
        "params": max(error(got["params"][name], value) for name, value in want.params.items()),
        "exp_avg": max(error(got["exp_avg"][name], value) for name, value in want.exp_avg.items()),
        **{
            key: max((error(got[key][name], value) for name, value in getattr(want, key).items()), default=0.0)
            for key in SECOND_MOMENTS
        },
    }
