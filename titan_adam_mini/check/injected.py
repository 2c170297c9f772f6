"""Steps with given gradients, on any mesh and in the oracle.

Parameters, gradients and schedule are the same everywhere: gradients differ by up to a factor of 100 between steps and
are clipped, the learning rate changes, and two parameter groups have different learning rates, betas and decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..optimizer import AdamMini
from .decoder import Sizes
from .meshes import Mesh, Placed, draw, factors, full_shapes, layouts, norms_along_tp
from .oracle import Oracle

STEPS = 20
"""Steps of the learning rate schedule."""
STEPS_TAKEN = 6
"""Steps taken by default: beyond the warm-up, with every gradient scale twice."""
EPS = 1e-8
MATRICES: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
VECTORS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.01}


def group_of(name: str) -> dict[str, Any]:
    """The hyper-parameters of a parameter."""
    return VECTORS if "norm" in name else MATRICES


def lr_factor(step: int) -> float:
    """Linear warm-up, then linear decay."""
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
    """Two parameter groups of named parameters; both exist on every pipeline stage."""
    return [
        {"params": [pair for pair in params.items() if group_of(pair[0]) is hyper], **hyper}
        for hyper in (MATRICES, VECTORS)
    ]


def set_lr(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rates of a step, as a scheduler would."""
    for group, hyper in zip(optimizer.param_groups, (MATRICES, VECTORS), strict=True):
        group["lr"] = hyper["lr"] * lr_factor(step)


def make(kind: str, params: Mapping[str, Tensor], sizes: Sizes, **options: Any) -> torch.optim.Optimizer:
    """AdamW (as a control, since it needs no blocks) or AdamMini."""
    if kind == "AdamW":
        return torch.optim.AdamW(groups(params), eps=EPS, foreach=False, **options)
    heads: dict[str, Any] = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
    return AdamMini(groups(params), eps=EPS, **heads, **options)


def take_step(mesh: Mesh, placed: Placed, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Step number `step` of the schedule, on one rank."""
    placed.inject(gradients(full_shapes(mesh.sizes), step), norms_along_tp(mesh))
    set_lr(optimizer, step)
    optimizer.step()


def full(tensor: Tensor) -> Tensor:
    """The full second moment, gathered by torch."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def advance(reference: Oracle, grads: Mapping[str, Tensor | None], step: int) -> None:
    """One step of the oracle with the hyper-parameters of both groups."""
    for hyper in (MATRICES, VECTORS):
        mine = {name: grad for name, grad in grads.items() if group_of(name) is hyper}
        decay = dict.fromkeys(mine, hyper["weight_decay"])
        reference.step(mine, lr=hyper["lr"] * lr_factor(step), betas=hyper["betas"], eps=EPS, weight_decay=decay)


@lru_cache
def oracle(sizes: Sizes, steps: int = STEPS_TAKEN, *, second_moment: str = "blocks") -> Oracle:
    """The oracle after this many steps."""
    shapes = full_shapes(sizes)
    reference = Oracle(
        values(shapes), layouts(sizes, second_moment), factors(sizes) if second_moment == "factored" else None
    )
    for step in range(steps):
        advance(reference, gradients(shapes, step), step)
    return reference
