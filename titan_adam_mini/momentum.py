"""Momentum in one byte under sharding: meshes that fit, and the way from one dtype to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .kernels import int8
from .kernels.int8 import RUN
from .sharding import as_state, local, shard_of


def check_runs(param: Tensor) -> None:
    """Raise ValueError, naming dim, run and mesh axis, if a mesh cuts a run of columns of int8 momentum."""
    dim = param.ndim - 1
    shard = shard_of(param)
    for level, cut in enumerate(shard.cuts_of(dim), 1):
        edges = {edge for piece in shard.pieces(dim, level) for edge in piece if edge < param.shape[dim]}
        inside = sorted(edge for edge in edges if edge % RUN)
        if inside:
            raise ValueError(
                f"momentum_dtype int8 has one scale per run of {RUN} columns, and mesh axis {cut.axis} (of {cut.size}) "
                f"cuts dim {dim}, of {param.shape[dim]} columns, at {inside[0]}, inside a run; choose another degree "
                f"for that axis, one that leaves every rank a multiple of {RUN} columns, or momentum_dtype bfloat16"
            )


def converted(expected: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The loaded state of one parameter with its momentum in the kind of `expected`: int8 with scales, or a float.

    What is there in the right kind stays what it is. Tensors must have the placements of `expected`.
    """
    state = dict(loaded)
    if "exp_avg_scale" in loaded and "exp_avg_scale" not in expected:
        values, scale = loaded["exp_avg"], state.pop("exp_avg_scale")
        wide = int8.dequantized(local(values), local(scale))
        placements = values.placements if isinstance(values, DTensor) else ()
        state["exp_avg"] = as_state(wide, values, values.shape, placements, values.stride())
    elif "exp_avg_scale" in expected and "exp_avg_scale" not in loaded and loaded["exp_avg"].dtype != torch.int8:
        wide = loaded["exp_avg"]
        for key in ("exp_avg", "exp_avg_scale"):
            state[key] = torch.empty_like(expected[key])
        int8.quantize(local(wide).float(), local(state["exp_avg"]), local(state["exp_avg_scale"]))
    return state
