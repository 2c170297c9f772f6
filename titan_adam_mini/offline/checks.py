"""Refuses runs that cannot start, take their first step or save on their mesh: pure, for all ranks at once.

Settings that are impossible on any mesh are refused in `refusals.py`.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch

from ..checkpoint.check import MIXED_UP, mixes_up, some
from ..momentum import cut_run, dtype_of
from .rank_memory import Kind, Optimizer, Run


def check(run: Run, configured: Optimizer) -> None:
    """Raise ValueError if the configured optimizer, the run's checkpoints or the model itself are not possible here."""
    if reason := refusal(run, configured):
        raise ValueError(reason)
    check_matrices(run)
    if run.checkpoints:
        check_checkpoints(run)


def refusal(run: Run, optimizer: Optimizer) -> str:
    """Why AdamMini with this dtype of momentum cannot run here; "" if it can. The words are those of `AdamMini`."""
    for param in run.params.values():
        kind = param.kind
        if not (optimizer.mini and param.blocks):
            continue
        if dtype_of(optimizer.momentum, kind.dtype, kind.shape) == torch.int8:
            reason = cut_run(kind.shard((0,) * len(kind.mesh.sizes)), kind.mesh.names)
            if reason:
                return f"AdamMini cannot plan {param.name!r}: {reason}"
    return ""


def check_checkpoints(run: Run) -> None:
    """Raise ValueError for tensors whose shards torch's distributed checkpoint would mix up on any rank."""
    checked: dict[Kind, bool] = {}
    wrong = []
    for param in run.params.values():
        if param.kind not in checked:
            checked[param.kind] = _mixed_up(param.kind)
        if checked[param.kind]:
            wrong.append(f"{param.name} {param.kind.shape} as {param.kind.placements}")
    if wrong:
        raise ValueError(MIXED_UP.format(some(wrong)))


def _mixed_up(kind: Kind) -> bool:
    zero = kind.shard((0,) * len(kind.mesh.sizes))
    # Where the outer cuts of every dim are even, torch is right (tests/memory): most tensors need no loop over ranks.
    outer = [prod(cut.size for cut in zero.cuts_of(dim)[:-1]) for dim in range(len(kind.shape))]
    if all(size % cuts == 0 for size, cuts in zip(kind.shape, outer, strict=True)):
        return False
    sizes = [size if axis in kind.sharded_axes else 1 for axis, size in enumerate(kind.mesh.sizes)]
    coordinates = product(*map(range, sizes))
    return any(mixes_up(kind.shard(place), kind.placements, kind.mesh.sizes, place) for place in coordinates)


def check_matrices(run: Run) -> None:
    """Raise ValueError for weights that tensor parallelism cannot shard evenly, which torch then cannot multiply.

    Embedding and output may be sharded unevenly; experts are multiplied rank by rank.
    """
    for param in run.params.values():
        kind = param.kind
        if len(kind.shape) != 2 or (param.blocks and param.blocks.role == "token"):
            continue
        for cut in kind.shard((0,) * len(kind.mesh.sizes)).cuts:
            if kind.mesh.names[cut.axis] == "tp" and kind.shape[cut.dim] % cut.size:
                raise ValueError(
                    f"tensor_parallel_degree {cut.size} does not divide the {kind.shape[cut.dim]} "
                    f"{('rows', 'columns')[cut.dim]} of {param.name}, and torch cannot multiply with uneven shards: "
                    "choose a degree that does"
                )
