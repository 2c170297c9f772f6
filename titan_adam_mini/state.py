"""Adopting loaded optimizer state: the values of a checkpoint, in the dtype, device and placement expected here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from . import momentum

CONVERT = (
    "convert it with `titan-adam-mini convert`, or, in torchtitan, let the run do it with "
    "[optimizer.adam_mini] load_adamw_state = true"
)
SECOND_MOMENTS = ("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean")
"""Keys of a parameter's grids: that of its blocks, and where it is factored those of its columns and of the whole."""
FOREIGN = ("vmean", "head_per_gpu", "neuron_per_gpu")
"""State that only the authors' adam-mini keeps: statistics of one GPU's part of a tensor."""
AUTHORS = (
    "the optimizer state of the authors' adam-mini, whose statistics belong to one GPU's part of a head and cannot be "
    "put together again: load the model alone, and let the moments grow anew"
)


def adopt_all(
    params: Mapping[Tensor, tuple[str, Any]], expected: Mapping[Tensor, Mapping[str, Tensor]], loaded: Mapping[Any, Any]
) -> dict[Tensor, dict[str, Tensor]]:
    """The loaded state of every parameter, each tensor as `expected` has it; says what momentum was converted.

    Nothing is changed in place.

    Args:
        params: parameter -> its name, and its key in `loaded`.

    Raises:
        ValueError: naming the parameter, if a tensor is missing or has another shape.
    """
    ways: momentum.Ways = Counter()
    state = {
        param: adopt(name, param, expected[param], loaded.get(key, {}), ways) for param, (name, key) in params.items()
    }
    momentum.say(ways)
    return state


def adopt(
    name: str, param: Tensor, expected: Mapping[str, Tensor], loaded: Mapping[str, Any], ways: momentum.Ways
) -> dict[str, Tensor]:
    """`adopt_all` for one parameter; conversions of momentum are counted in `ways`."""
    if any(key in loaded for key in FOREIGN):
        raise ValueError(f"the loaded state of {name!r} is {AUTHORS}")
    first = loaded.get("exp_avg")
    if isinstance(first, Tensor) and first.shape == param.shape:
        if first.dtype != torch.int8 and expected["exp_avg"].dtype == torch.int8:
            loaded = {**loaded, "exp_avg": _placed(first, expected["exp_avg"])}
        try:
            loaded = momentum.converted(expected, loaded, ways)
        except ValueError as error:
            raise ValueError(f"the loaded state of {name!r} {error}") from None
    # torch fills keys that a flat state dict lacks with empty dicts.
    loaded = {key: value for key, value in loaded.items() if not isinstance(value, dict)}
    missing = [key for key in expected if key not in loaded]
    if missing:
        hint = ""
        if SECOND_MOMENTS[1] in missing and (second := loaded.get(SECOND_MOMENTS[0])) is not None:
            elementwise = isinstance(second, Tensor) and second.shape == param.shape
            hint = (
                f": it is of AdamW; {CONVERT}"
                if elementwise
                else ": it is of a run whose second_moment is not factored"
            )
        raise ValueError(
            f"the loaded state of {name!r} has no {', '.join(missing)} (it has {sorted(loaded) or 'none'}){hint}"
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
        state[key] = _placed(value, want).to(dtype=want.dtype)
    return state


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
