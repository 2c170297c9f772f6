"""Momentum dtypes: which one a parameter gets, supported meshes, and conversions between dtypes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .kernels import int8
from .kernels.int8 import RUN
from .sharding import Shard, as_state, local, shard_of

log = logging.getLogger("titan_adam_mini")

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Selectable dtypes, by name."""

Conversions = Counter[tuple[torch.dtype, torch.dtype]]
"""(from, to) -> number of parameters whose momentum was converted."""


def dtype_of(momentum_dtype: torch.dtype | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.dtype:
    """The momentum dtype of a parameter of this dtype and global shape; see `momentum_dtype` of AdamMini."""
    chosen = momentum_dtype or dtype
    return torch.float32 if chosen == torch.int8 and not int8.fits(shape) else chosen


def summary(dtypes: Iterable[torch.dtype]) -> str:
    """The number of parameters per momentum dtype, as text."""
    return ", ".join(f"{_dtype_name(dtype)} for {count}" for dtype, count in Counter(dtypes).items())


def check_runs(param: Tensor) -> None:
    """Raise ValueError if a mesh cuts a run of columns of int8 momentum; see `cut_run`."""
    names = param.device_mesh.mesh_dim_names if isinstance(param, DTensor) else None
    if message := cut_run(shard_of(param), names):
        raise ValueError(message)


def cut_run(shard: Shard, names: Sequence[str] | None) -> str:
    """An error message if a mesh cuts a run of columns of int8 momentum, else "".

    It depends on the shape, the placements and the mesh, and is the same on every rank.

    Args:
        shard: of any rank.
        names: of the mesh's axes, if they have names.
    """
    dim = len(shard.shape) - 1
    for level, cut in enumerate(shard.cuts_of(dim), 1):
        edges = {edge for piece in shard.pieces(dim, level) for edge in piece if edge < shard.shape[dim]}
        inside = sorted(edge for edge in edges if edge % RUN)
        if inside:
            axis = f"{names[cut.axis]!r}" if names else f"{cut.axis}"
            return (
                f"momentum_dtype int8 has one scale per run of {RUN} columns, but mesh axis {axis} (of {cut.size}) "
                f"cuts dim {dim}, of {shard.shape[dim]} columns, at {inside[0]}, inside a run; choose another degree "
                f"for that axis, one that leaves every rank a multiple of {RUN} columns, or momentum_dtype bfloat16"
            )
    return ""


def empty_momentum(like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised tensors for momentum of another dtype, with the placements of the momentum `like`.

    Raises ValueError for int8 if the mesh cuts runs.
    """
    data, same = local(like), like.placements if isinstance(like, DTensor) else ()
    state = {"exp_avg": as_state(torch.empty_like(data, dtype=dtype), like, like.shape, same, like.stride())}
    if dtype == torch.int8:
        check_runs(like)
        scale = torch.empty(int8.scale_shape(data.shape), dtype=torch.float32, device=data.device)
        state["exp_avg_scale"] = as_state(scale, like, int8.scale_shape(like.shape), same)
    return state


def converted(expected: Mapping[str, Tensor], loaded: Mapping[str, Any], conversions: Conversions) -> dict[str, Any]:
    """The loaded state of one parameter with its momentum in the dtype of `expected`; a conversion is counted in
    `conversions`. All tensors must have the placements of `expected`, except int8 that is converted to a float.

    Raises ValueError for int8 without scales.
    """
    state = dict(loaded)
    if not isinstance(state.get("exp_avg_scale"), Tensor):
        state.pop("exp_avg_scale", None)  # torch inserts an empty dict for what a flat state dict lacks
    there, here = state["exp_avg"], expected["exp_avg"]
    if there.dtype == torch.int8 and "exp_avg_scale" not in state:
        raise ValueError(
            "has int8 momentum without its scales (exp_avg_scale), which torch drops from flat state dicts if the "
            "optimizer that loads them has none: pass it nested (flatten_optimizer_state_dict=False), or load it "
            "with momentum_dtype=torch.int8"
        )
    if there.dtype == here.dtype:
        return state
    conversions[there.dtype, here.dtype] += 1
    placements = there.placements if isinstance(there, DTensor) else ()
    wide = local(there)
    if there.dtype == torch.int8:
        wide = int8.dequantized(wide, local(state.pop("exp_avg_scale")))
    if here.dtype == torch.int8:
        state |= empty_momentum(here, torch.int8)
        int8.quantize(wide.float(), local(state["exp_avg"]), local(state["exp_avg_scale"]))
    else:
        state["exp_avg"] = as_state(wide.to(here.dtype), there, there.shape, placements, there.stride())
    return state


def log_conversions(conversions: Conversions) -> None:
    """Log conversions on the first rank, in one line, if there were any."""
    if not conversions or (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        return
    shown = [
        f"from {_dtype_name(there)} to {_dtype_name(here)} for {count} parameters"
        for (there, here), count in conversions.items()
    ]
    log.warning(f"AdamMini: momentum converted {', '.join(shown)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
