"""Checks that the tensors of a step still match the plan, at every step, before their addresses are used.

With many small tensors a step is bound by the time Python needs to inspect them, so a tensor is fully checked only if
it is a different object than in the last step, or has a different address, shape, strides or dtype. A tensor whose
memory was released while its shape was kept (as offloading does) has a different, null address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sharding import box_shape
from . import ParamStep, Spec, int8

LOW = 1 << 40
"""A tensor without memory has its offset as its address, so tensors with lower addresses are fully checked."""


@dataclass(eq=False)
class Note:
    """Properties of the tensors of a parameter when they were last fully checked.

    Attributes:
        facts: identities, addresses, shape and strides of the parameter and its state; see `check`.
        grad: shape, strides, dtype and device of the gradient; None if there is none.
        kind: device and dtypes; parameters of equal kind are updated together.
        copied: names of the tensors of which compiled code reads a copy; filled in by an engine.
    """

    facts: tuple[Any, ...]
    grad: tuple[Any, ...] | None
    kind: tuple[Any, ...]
    copied: tuple[str, ...] | None = None


def check(param_steps: Sequence[ParamStep], step_on_device: bool) -> None:
    """See `Engine.check`."""
    for param_step in param_steps:
        param, grad, exp_avg, scale = param_step.param, param_step.grad, param_step.exp_avg, param_step.exp_avg_scale
        moments, step, note = param_step.exp_avg_sq, param_step.step, param_step.note
        # The first five are the addresses at the beginning of a row of a `Table`.
        facts: tuple[Any, ...] = (
            param.data_ptr(),
            exp_avg.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            moments.data_ptr(),
            step.data_ptr(),
            id(param),
            id(exp_avg),
            id(scale),
            id(moments),
            id(step),
            param.shape,
            param.stride(),
            exp_avg.stride(),
        )
        for factor in param_step.factors:
            facts += (factor.exp_avg_sq.data_ptr(), id(factor.exp_avg_sq))
        seen = None if grad is None else (grad.shape, grad.stride(), grad.dtype, grad.device)
        low = grad is not None and grad.data_ptr() < LOW and grad.numel()
        if note is None or low or facts != note.facts or seen != note.grad:
            check_tensors(param_step, step_on_device)
            param_step.note = Note(facts, seen, _kind(param_step))
        param_step.checked = True


def _kind(param_step: ParamStep) -> tuple[Any, ...]:
    assert param_step.spec is not None
    param, grad = param_step.param, None if param_step.grad is None else param_step.grad.dtype
    return (
        param.device,
        param_step.exp_avg_sq.dtype,
        param.dtype,
        grad,
        param_step.exp_avg.dtype,
        rounds(param_step.spec),
    )


def rounds(spec: Spec) -> bool:
    """Whether a parameter is rounded stochastically. Only bfloat16 ones are."""
    return spec.rounds and spec.param == torch.bfloat16


# The full check


def check_tensors(param_step: ParamStep, step_on_device: bool | None) -> None:
    """The full `check` of one parameter.

    Args:
        step_on_device: whether `step` must be on its parameter's device, or on the CPU. None for either.
    """
    spec, param, grad = param_step.spec, param_step.param, param_step.grad
    assert spec is not None
    name, device = param_step.name, param.device
    if param.shape != (shape := _local_shape(spec)):
        raise ValueError(
            f"{name!r} has shape {tuple(param.shape)}, but had {shape} when AdamMini was planned: the state does not "
            "fit; build a new optimizer after a parameter's shape has changed"
        )
    if (device.type, param.dtype) != (spec.device, spec.param):
        raise ValueError(
            f"{name!r} is {param.dtype} on {device.type}, but was {spec.param} on {spec.device} when AdamMini was "
            "planned; move or convert the model before building the optimizer, or build a new one and load the old "
            "one's state_dict() into it"
        )
    if (spec.exp_avg == torch.int8) != (param_step.exp_avg_scale is not None):
        raise ValueError(f"the state of {name!r} has int8 momentum without its scales (exp_avg_scale), or only scales")
    tensors = list(_expected(param_step, spec, shape))
    for key, tensor, want, dtype in tensors:
        if tuple(tensor.shape) != want or (dtype is not None and tensor.dtype != dtype):
            raise ValueError(
                f"{key} of {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, but AdamMini needs "
                f"{dtype or 'a tensor'} of shape {want}; "
                + (
                    "clear gradients from before the parameter's shape changed (zero_grad())"
                    if tensor is grad
                    else "load state with load_state_dict(), which checks and converts it"
                )
            )
        where = {device} if tensor is not param_step.step or step_on_device else {torch.device("cpu")}
        if tensor is param_step.step and step_on_device is None:
            where.add(device)
        if tensor.device not in where:
            raise ValueError(
                f"{key} of {name!r} is on {tensor.device} and the parameter on {device}; AdamMini needs it on "
                f"{' or '.join(map(str, where))}: move it back before step()"
            )
    for key, tensor, _, _ in [("the parameter", param, shape, None), *tensors]:
        needed = _bytes_needed(tensor)
        if needed and tensor.untyped_storage().nbytes() < needed:
            of = "" if tensor is param else " of"
            raise ValueError(
                f"the memory of {key.removeprefix('the ')}{of} {name!r} has been released: it has "
                f"{tensor.untyped_storage().nbytes()} bytes of the {needed} that its shape needs; if it was offloaded, "
                "load it back before step()"
            )


def _expected(
    param_step: ParamStep, spec: Spec, shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, tuple[int, ...], torch.dtype | None]]:
    """All tensors except the parameter: name, tensor, expected shape and dtype."""
    if param_step.grad is not None:
        yield "the gradient", param_step.grad, shape, None
    yield "exp_avg", param_step.exp_avg, shape, spec.exp_avg
    if param_step.exp_avg_scale is not None:
        yield "exp_avg_scale", param_step.exp_avg_scale, int8.scale_shape(shape), torch.float32
    grids = (param_step.exp_avg_sq, *(factor.exp_avg_sq for factor in param_step.factors))
    for key, grid, plan in zip(("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean"), grids, spec.plans, strict=False):
        yield key, grid, plan.grid_shape, spec.exp_avg_sq
    yield "step", param_step.step, (), torch.float32


def _local_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of this rank's part of a parameter."""
    shard = spec.plans[0].shard
    return box_shape(shard.box()) if shard.flat is None else (shard.flat[1] - shard.flat[0],)


def _bytes_needed(tensor: Tensor) -> int:
    """Bytes from the beginning of the storage to the last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size()
