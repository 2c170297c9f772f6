"""Gradients missing on any ranks, in any pattern: nobody hangs, and what all ranks share stays one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from injected import agreed, holdings, together
from meshes import CATALOGUE
from ranks import run

from titan_adam_mini.check.injected import advance, gradients, make, set_lr, values
from titan_adam_mini.check.meshes import Placed, full_shapes, layouts, norms_along_tp
from titan_adam_mini.check.oracle import Oracle, error

STEPS = 8


def present(seed: int, step: int, ranks: int, names: list[str]) -> dict[str, list[bool]]:
    """Per parameter, which ranks have its gradient. Every fourth step nobody has any."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    chance = 0.0 if step % 4 == 3 else 0.6
    return {name: (torch.rand(ranks, generator=generator) < chance).tolist() for name in names}


def train(rank: int, world: int, name: str, seed: int) -> dict[str, Any]:
    """On one rank: steps with the gradients that this rank has."""
    mesh = CATALOGUE[name]
    shapes = full_shapes(mesh.sizes)
    placed = Placed.decoder(mesh).fill(values(shapes))
    optimizer = make("AdamMini", placed.params, mesh.sizes)
    for step in range(STEPS):
        there = present(seed, step, world, list(shapes))
        mine = {key: grad if there[key][rank] else None for key, grad in gradients(shapes, step).items()}
        placed.inject(mine, norms_along_tp(mesh))
        set_lr(optimizer, step)
        optimizer.step()
    return holdings(placed, optimizer)


@pytest.mark.parametrize(("name", "seed"), [("FSDP2 5", 1), pytest.param("FSDP2 7", 2, marks=pytest.mark.slow)])
def test_second_moments_count_missing_gradients_as_zeros(name: str, seed: int) -> None:
    """A rank without a gradient adds zeros, and keeps its part of the parameter and of the first moment."""
    mesh = CATALOGUE[name]
    shapes, world = full_shapes(mesh.sizes), mesh.world
    ranks = run(train, world, name, seed, timeout=120)
    oracle = Oracle(values(shapes), layouts(mesh.sizes))
    for step in range(STEPS):
        there, grads, masks = present(seed, step, world, list(shapes)), gradients(shapes, step), {}
        for key, grad in grads.items():
            masks[key] = torch.zeros(grad.numel(), dtype=torch.bool)
            for rank, one in enumerate(ranks):
                masks[key][one["params"][key][0]] = there[key][rank]
            masks[key] = masks[key].view(grad.shape)
        before = {key: (oracle.params[key].clone(), oracle.exp_avg[key].clone()) for key in shapes}
        some = {key: grad * masks[key] if any(there[key]) else None for key, grad in grads.items()}
        advance(oracle, some, step)
        for key, (param, exp_avg) in before.items():
            oracle.params[key] = torch.where(masks[key], oracle.params[key], param)
            oracle.exp_avg[key] = torch.where(masks[key], oracle.exp_avg[key], exp_avg)
    got = together(shapes, ranks)  # replicas of second moments and steps are equal, or this fails
    for key in shapes:
        assert got["step"][key] == oracle.steps[key], key
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            assert error(got[kind][key], getattr(oracle, kind)[key]) < 1e-12, (kind, key)


@pytest.mark.parametrize(
    "name", ["FSDP2 x TP 3x2", "TP 3", pytest.param("PP x FSDP2 x TP 2x2x2", marks=pytest.mark.slow)]
)
def test_steps_and_second_moments_stay_equal_on_all_ranks(name: str) -> None:
    """Of every parameter that all axes cut, and under tensor parallelism alone of norms with gradients in parts."""
    mesh = CATALOGUE[name]
    # FSDP2 over TP: whether the replicas of a norm have a gradient is for the trainer to keep equal; nobody is asked.
    names = [key for key in full_shapes(mesh.sizes) if "norm" not in key or mesh.partial]
    ranks = run(train, mesh.world, name, 5, timeout=120)
    for kind in ("step", "exp_avg_sq"):
        same = agreed([{key: value for key, value in one[kind].items() if key in names} for one in ranks])
        assert len(same) == len(names)
    steps = [value for one in ranks for value in one["step"].values()]
    assert 0 < min(steps) <= max(steps) < STEPS
