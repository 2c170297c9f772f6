"""The optimizer state of one parameter: new, loaded from a checkpoint, or set by other code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from . import momentum
from .kernels import int8
from .plan import BlockPlan
from .sharding import as_state, local

CONVERT = (
    "convert it with `titan-adam-mini convert`, or, in torchtitan, let the run do it with "
    "[optimizer.adam_mini] load_adamw_state = true"
)
SECOND_MOMENTS = ("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean")
"""Keys of a parameter's grids: blocks (or rows), and if factored, columns and the mean of the matrix."""
UPSTREAM_KEYS = ("vmean", "head_per_gpu", "neuron_per_gpu")
"""State keys that only the authors' adam-mini has: statistics of one GPU's part of a tensor."""
UPSTREAM_STATE = (
    "the optimizer state of the authors' adam-mini, whose statistics cover one GPU's part of a head and cannot be "
    "merged: load only the model, and start with new moments"
)


def new_state(
    name: str,
    param: Tensor,
    plans: Sequence[BlockPlan],
    momentum_dtype: torch.dtype,
    step_on_device: bool,
) -> dict[str, Tensor]:
    """The state of a parameter before its first step.

    Args:
        plans: one per grid of second moments.
        step_on_device: whether `step` is on the parameter's device; on the CPU otherwise.

    Raises ValueError if the parameter itself is on the meta device.
    """
    data = local(param)
    if data.is_meta:
        raise ValueError(f"{name!r} is on the meta device: materialise the model (to_empty, then initialise)")
    same = param.placements if isinstance(param, DTensor) else ()
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    exp_avg = torch.zeros_like(data, dtype=momentum_dtype, device=data.device)
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=data.device if step_on_device else "cpu"),
        "exp_avg": as_state(exp_avg, param, param.shape, same, param.stride()),
    }
    for key, plan in zip(SECOND_MOMENTS, plans, strict=False):
        grid = [placement if axis in plan.aligned_axes else Replicate() for axis, placement in enumerate(same)]
        zeros = torch.zeros(plan.grid_shape, dtype=dtype, device=data.device)
        state[key] = as_state(zeros, param, plan.layout.grid_shape, grid)
    if momentum_dtype == torch.int8:
        scale = torch.zeros(int8.scale_shape(data.shape), dtype=torch.float32, device=data.device)
        state["exp_avg_scale"] = as_state(scale, param, int8.scale_shape(param.shape), same)
    return state


def check_state(name: str, param: Tensor, plans: Sequence[BlockPlan], state: Mapping[str, Any]) -> None:
    """Raise ValueError if existing state does not fit its parameter's shape and partition."""
    expected = {"exp_avg": tuple(param.shape)}
    expected |= {key: plan.layout.grid_shape for key, plan in zip(SECOND_MOMENTS, plans, strict=False)}
    for key, want in expected.items():
        value = state.get(key)
        have = tuple(value.shape) if isinstance(value, Tensor) else None
        if have != want:
            raise ValueError(
                f"the state of {name!r} has {key} of shape {have}, but the parameter, of shape {tuple(param.shape)}, "
                f"needs {want}: the state belongs to another shape or partition; delete it to start with new state "
                "(del optimizer.state[parameter])"
            )


def follow_parameter(name: str, state: dict[str, Any], data: Tensor, step_on_device: bool) -> None:
    """Move state to the device of its parameter; `step` may be a number.

    Args:
        data: the parameter's local tensor.
    """
    if not isinstance(state["step"], Tensor):
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    device = data.device
    for key, value in state.items():
        want = device if step_on_device or key != "step" else _CPU
        if value.device != want and not value.is_meta:  # a meta tensor has no values: refused before the step
            state[key] = value.to(want)


_CPU = torch.device("cpu")


def adopt_all(
    stored: Mapping[Tensor, tuple[str, Mapping[str, Any]]], expected: Callable[[str, Tensor], Mapping[str, Tensor]]
) -> dict[Tensor, dict[str, Tensor]]:
    """The loaded state of every parameter, with dtypes and placements of new state; logs momentum conversions.

    Nothing is changed in place.

    Args:
        stored: parameter -> its name, and its loaded state.
        expected: gives the new state of a parameter.

    Raises:
        ValueError: naming the parameter, if a tensor is missing or has another shape.
    """
    conversions: momentum.Conversions = Counter()
    state = {
        param: adopt(name, param, expected(name, param), loaded, conversions)
        for param, (name, loaded) in stored.items()
    }
    momentum.log_conversions(conversions)
    return state


def adopt(
    name: str,
    param: Tensor,
    expected: Mapping[str, Tensor],
    loaded: Mapping[str, Any],
    conversions: momentum.Conversions,
) -> dict[str, Tensor]:
    """`adopt_all` for one parameter; conversions of momentum are counted in `conversions`."""
    if any(key in loaded for key in UPSTREAM_KEYS):
        raise ValueError(f"the loaded state of {name!r} is {UPSTREAM_STATE}")
    first = loaded.get("exp_avg")
    if isinstance(first, Tensor) and first.shape == param.shape:
        if first.dtype != torch.int8 and expected["exp_avg"].dtype == torch.int8:
            loaded = {**loaded, "exp_avg": _placed(first, expected["exp_avg"])}
        try:
            loaded = momentum.converted(expected, loaded, conversions)
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
                f": it is AdamW's; {CONVERT}"
                if elementwise
                else ": it is from a run whose second_moment is not factored"
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
                f"the loaded {key} of {name!r} has shape {tuple(value.shape)}, but this partition needs "
                f"{tuple(want.shape)}: the state is from {hint}"
            )
        state[key] = _placed(value, want).to(dtype=want.dtype)
    return state


def _placed(value: Tensor, want: Tensor) -> Tensor:
    """`value` with the device and placements of `want`; unchanged if it has them."""
    if isinstance(want, DTensor):
        if not isinstance(value, DTensor):
            value = distribute_tensor(value.to(want.device), want.device_mesh, want.placements, src_data_rank=None)
        elif value.placements != want.placements:
            value = value.redistribute(want.device_mesh, want.placements)
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to(device=want.device)
