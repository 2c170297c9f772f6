"""Some steps with gradients put there by hand, on any mesh of the catalogue and in the oracle.

Same values, gradients and schedule everywhere: gradients change in size by a hundred from step to step and are
clipped, the learning rate moves, and two parameter groups differ in learning rate, betas and decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from collectives import Collective, Collectives
from decoder import Sizes
from meshes import MESHES, Mesh, Placed, draw, factors, full_shapes, layouts, local, norms_along_tp, whole
from oracle import Oracle, error
from ranks import run
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_adam_mini import AdamMini
from titan_adam_mini.state import SECOND_MOMENTS

STEPS = 20
"""Of the schedule of the learning rate."""
SOME = 6
"""That are taken: past the warm-up, with every size of gradients twice."""
EPS = 1e-8
MATRICES = {"lr": 3e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
VECTORS = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.01}


def group_of(name: str) -> dict[str, Any]:
    """The hyper-parameters of a parameter."""
    return VECTORS if "norm" in name else MATRICES


def lr_factor(step: int) -> float:
    """Warm-up, then down."""
    return min(1.0, (step + 1) / 5) * (1 - step / (2 * STEPS))


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters at the start."""
    return draw(shapes, seed=0, scale=0.5)


def gradients(shapes: Mapping[str, tuple[int, ...]], step: int) -> dict[str, Tensor]:
    """The gradients of one step, clipped to a norm of 1."""
    grads = draw(shapes, seed=step + 1, scale=10.0 ** (step % 3 - 2))
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    return {name: grad / norm.clamp_min(1.0) for name, grad in grads.items()}


def groups(params: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Two parameter groups of named parameters; both are there on every pipeline stage."""
    return [
        {"params": [pair for pair in params.items() if group_of(pair[0]) is hyper], **hyper}
        for hyper in (MATRICES, VECTORS)
    ]


def set_lr(optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a scheduler does."""
    for group, hyper in zip(optimizer.param_groups, (MATRICES, VECTORS), strict=True):
        group["lr"] = hyper["lr"] * lr_factor(step)


def make(kind: str, params: Mapping[str, Tensor], sizes: Sizes, **options: Any) -> torch.optim.Optimizer:
    """AdamW (the control: it needs no blocks) or AdamMini."""
    if kind == "AdamW":
        return torch.optim.AdamW(groups(params), eps=EPS, foreach=False, **options)
    heads = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
    return AdamMini(groups(params), eps=EPS, **heads, **options)


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


def take_step(mesh: Mesh, placed: Placed, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Step number `step` of the schedule, on one rank."""
    placed.inject(gradients(full_shapes(mesh.sizes), step), norms_along_tp(mesh))
    set_lr(optimizer, step)
    optimizer.step()


def on_one_device(
    sizes: Sizes, kind: str = "AdamMini", dtype: torch.dtype = torch.float64, steps: int = SOME, **options: Any
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


def full(tensor: Tensor) -> Tensor:
    """The whole of a second moment, by torch."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


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
    name: str, kind: str = "AdamMini", dtype: torch.dtype = torch.float64, steps: int = SOME, **options: Any
) -> tuple[dict[str, dict[str, Any]], list[list[list[Collective]]]]:
    """`train` on all ranks of a mesh: everything together, and by rank the collectives."""
    mesh = MESHES[name]
    ranks = run(train, mesh.world, name, kind, dtype, steps, options)
    return together(full_shapes(mesh.sizes), ranks), [one["collectives"] for one in ranks]


def advance(one: Oracle, grads: Mapping[str, Tensor | None], step: int) -> None:
    """One step of the oracle with the hyper-parameters of both groups."""
    for hyper in (MATRICES, VECTORS):
        mine = {name: grad for name, grad in grads.items() if group_of(name) is hyper}
        decay = dict.fromkeys(mine, hyper["weight_decay"])
        one.step(mine, lr=hyper["lr"] * lr_factor(step), betas=hyper["betas"], eps=EPS, weight_decay=decay)


@lru_cache
def oracle(sizes: Sizes, steps: int = SOME, *, second_moment: str = "blocks") -> Oracle:
    """The oracle after so many steps."""
    shapes = full_shapes(sizes)
    one = Oracle(values(shapes), layouts(sizes, second_moment), factors(sizes) if second_moment == "factored" else None)
    for step in range(steps):
        advance(one, gradients(shapes, step), step)
    return one


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
