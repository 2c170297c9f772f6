"""What the addresses of a step stand on, compared in every step with what was planned, before one is used.

A step of many small tensors takes as long as Python takes to look at them, so a tensor is looked at closely only when
it is another object than in the last step, or at another address, or when its shape, strides or dtype have changed.
Memory that is released and shape that is kept (as offloading does it) shows as another address: that of nothing.
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
"""A tensor without memory has its offset for an address: all below are looked at closely, those of real memory too."""


@dataclass(eq=False)
class Note:
    """What the tensors of a parameter were when they were last looked at closely.

    Attributes:
        facts: identities, addresses, shape and strides of the parameter and its state; see `check`.
        grad: shape, strides, dtype and device of the gradient; None if there is none.
        kind: device and dtypes, what decides who is served together.
        copied: of what compiled code reads a copy; an engine's to fill in.
    """

    facts: tuple[Any, ...]
    grad: tuple[Any, ...] | None
    kind: tuple[Any, ...]
    copied: tuple[str, ...] | None = None


def check(works: Sequence[ParamStep], step_on_device: bool) -> None:
    """See `Engine.check`."""
    for work in works:
        param, grad, exp_avg, scale = work.param, work.grad, work.exp_avg, work.exp_avg_scale
        moments, step, note = work.exp_avg_sq, work.step, work.note
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
        for factor in work.factors:
            facts += (factor.exp_avg_sq.data_ptr(), id(factor.exp_avg_sq))
        seen = None if grad is None else (grad.shape, grad.stride(), grad.dtype, grad.device)
        low = grad is not None and grad.data_ptr() < LOW and grad.numel()
        if note is None or low or facts != note.facts or seen != note.grad:
            look_at(work, step_on_device)
            work.note = Note(facts, seen, _kind(work))
        work.checked = True


def _kind(work: ParamStep) -> tuple[Any, ...]:
    assert work.spec is not None
    param, grad = work.param, None if work.grad is None else work.grad.dtype
    return param.device, work.exp_avg_sq.dtype, param.dtype, grad, work.exp_avg.dtype, rounds(work.spec)


def rounds(spec: Spec) -> bool:
    """Is a parameter rounded at random? Only bfloat16 ones are."""
    return spec.rounds and spec.param == torch.bfloat16


# A close look


def look_at(work: ParamStep, step_on_device: bool | None) -> None:
    """`check` for one parameter, everything compared.

    Args:
        step_on_device: must `step` be where its parameter is, or on the CPU? None for either.
    """
    spec, param, grad = work.spec, work.param, work.grad
    assert spec is not None
    name, device = work.name, param.device
    if param.shape != (shape := _local_shape(spec)):
        raise ValueError(
            f"{name!r} has shape {tuple(param.shape)} here, and had {shape} when AdamMini was planned: state cannot "
            "follow; make a new optimizer once parameters have changed their shape"
        )
    if (device.type, param.dtype) != (spec.device, spec.param):
        raise ValueError(
            f"{name!r} is {param.dtype} on {device.type} here, and was {spec.param} on {spec.device} when AdamMini was "
            "planned; move or convert the model before the optimizer is made, or make a new one and load the old one's "
            "state_dict() into it"
        )
    if (spec.exp_avg == torch.int8) != (work.exp_avg_scale is not None):
        raise ValueError(f"the state of {name!r} has int8 momentum without its scales (exp_avg_scale), or scales alone")
    tensors = list(_expected(work, spec, shape))
    for key, tensor, want, dtype in tensors:
        if tuple(tensor.shape) != want or (dtype is not None and tensor.dtype != dtype):
            raise ValueError(
                f"{key} of {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, and AdamMini needs "
                f"{dtype or 'a tensor'} of shape {want}; "
                + (
                    "drop gradients of before a parameter's shape was changed (zero_grad())"
                    if tensor is grad
                    else "load state with load_state_dict(), which checks and converts it"
                )
            )
        where = {device} if tensor is not work.step or step_on_device else {torch.device("cpu")}
        if tensor is work.step and step_on_device is None:
            where.add(device)
        if tensor.device not in where:
            raise ValueError(
                f"{key} of {name!r} is on {tensor.device} and the parameter on {device}; AdamMini needs it on "
                f"{' or '.join(map(str, where))}: whoever moved it must move it back before step()"
            )
    for key, tensor, _, _ in [("the parameter", param, shape, None), *tensors]:
        needed = _bytes_needed(tensor)
        if needed and tensor.untyped_storage().nbytes() < needed:
            of = "" if tensor is param else " of"
            raise ValueError(
                f"the memory of {key.removeprefix('the ')}{of} {name!r} has been released: it has "
                f"{tensor.untyped_storage().nbytes()} bytes of the {needed} that its shape needs; whoever offloaded it "
                "must bring it back before step()"
            )


def _expected(
    work: ParamStep, spec: Spec, shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, tuple[int, ...], torch.dtype | None]]:
    """All tensors beside the parameter: what they are called, and the shape and dtype that they must have."""
    if work.grad is not None:
        yield "the gradient", work.grad, shape, None
    yield "exp_avg", work.exp_avg, shape, spec.exp_avg
    if work.exp_avg_scale is not None:
        yield "exp_avg_scale", work.exp_avg_scale, int8.scale_shape(shape), torch.float32
    grids = (work.exp_avg_sq, *(factor.exp_avg_sq for factor in work.factors))
    for key, grid, plan in zip(("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_mean"), grids, spec.plans, strict=False):
        yield key, grid, plan.grid_shape, spec.exp_avg_sq
    yield "step", work.step, (), torch.float32


def _local_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of this rank's part of a parameter."""
    shard = spec.plans[0].shard
    return box_shape(shard.box()) if shard.flat is None else (shard.flat[1] - shard.flat[0],)


def _bytes_needed(tensor: Tensor) -> int:
    """From the beginning of the storage to the last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size()
