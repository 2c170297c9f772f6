"""Adopting loaded optimizer state: the values of a checkpoint, in the dtype, device and placement expected here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .momentum import converted

log = logging.getLogger("titan_adam_mini")


CONVERT = (
    "convert it with `titan-adam-mini convert`, or, in torchtitan, let the run do it with "
    "[optimizer.adam_mini] load_adamw_state = true"
)
FOREIGN = ("vmean", "head_per_gpu", "neuron_per_gpu")
"""State that only the authors' adam-mini keeps: statistics of one GPU's part of a tensor."""
AUTHORS = (
    "the optimizer state of the authors' adam-mini, whose statistics belong to one GPU's part of a head and cannot be "
    "put together again: load the model alone, and let the moments grow anew"
)


def adopt(name: str, param: Tensor, expected: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loaded state of one parameter, each tensor as `expected` has it. Nothing is changed in place.

    Raises ValueError, naming the parameter, if a tensor is missing or has another shape.
    """
    if any(key in loaded for key in FOREIGN):
        raise ValueError(f"the loaded state of {name!r} is {AUTHORS}")
    if ("exp_avg_scale" in loaded) != ("exp_avg_scale" in expected) and "exp_avg" in loaded:
        way = "from int8 to" if "exp_avg_scale" in loaded else "to int8 from"
        other = expected["exp_avg"] if "exp_avg_scale" in loaded else loaded["exp_avg"]
        log.warning(f"AdamMini: momentum of {name} converted {way} {other.dtype}")
        near = {key: _placed(loaded[key], expected["exp_avg"]) for key in ("exp_avg", "exp_avg_scale") if key in loaded}
        loaded = converted(expected, {**loaded, **near})
    missing = [key for key in expected if key not in loaded]
    if missing:
        raise ValueError(
            f"the loaded state of {name!r} has no {', '.join(missing)} (it has {sorted(loaded) or 'none'})"
        )
    state = {}
    for key, want in expected.items():
        value = torch.as_tensor(loaded[key])
        if value.shape != want.shape:
            hint = "another partition, or other head counts"
            if key == "exp_avg_sq" and value.shape == param.shape:
                hint = f"AdamW, with one second moment per element; {CONVERT}"
            raise ValueError(
                f"the loaded {key} of {name!r} has shape {tuple(value.shape)}, this partition needs "
                f"{tuple(want.shape)}: the state is of {hint}"
            )
        if key == "exp_avg" and value.dtype != want.dtype:
            log.warning(f"AdamMini: momentum of {name} converted from {value.dtype} to {want.dtype}")
        state[key] = _like(value, want)
    return state


def _like(value: Tensor, want: Tensor) -> Tensor:
    """`value` with the dtype, device and placements of `want`; itself if it has them."""
    return _placed(value, want).to(dtype=want.dtype)


def _placed(value: Tensor, want: Tensor) -> Tensor:
    """`value` with the device and placements of `want`; itself if it has them."""
    if isinstance(want, DTensor):
        if not isinstance(value, DTensor):
            value = distribute_tensor(value.to(want.device), want.device_mesh, want.placements, src_data_rank=None)
        elif value.placements != want.placements:
            value = value.redistribute(want.device_mesh, want.placements)
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to(device=want.device)
