"""AdamW's state of one parameter, read box by box from an optimizer in memory or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.check import check_parameters
from ..checkpoint.stored import EXP_AVG, EXP_AVG_SQ, GROUPS, STATE, Stored
from ..sharding import Box, box_shape
from ..state import UPSTREAM_STATE

Read = Callable[[Box], Tensor]
"""Reads a box of a tensor, to the CPU."""

_OPTIMIZER = "optimizer."
_NEEDED = "inspect needs AdamW's state, with one second moment per element"


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one parameter.

    Attributes:
        name, shape: of the parameter.
        second: reads `exp_avg_sq`.
        first: reads `exp_avg`; None if only the second moments are known, so that updates are unknown.
        step, betas, eps: of the optimizer.
        stored: its boxes on disk; windows stay inside them.
    """

    name: str
    shape: tuple[int, ...]
    second: Read
    first: Read | None = None
    step: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    stored: tuple[Box, ...] = ()

    @staticmethod
    def of(name: str, exp_avg_sq: Tensor, exp_avg: Tensor | None = None, **options: Any) -> Moments:
        """From tensors of the parameter's shape; `options` are `step`, `betas` and `eps`."""
        first = None if exp_avg is None else _reader(exp_avg)
        return Moments(name, tuple(exp_avg_sq.shape), _reader(exp_avg_sq), first, **options)

    @staticmethod
    def without_state(name: str, shape: Sequence[int]) -> Moments:
        """For a parameter without optimizer state: it never had a gradient, so its second moments are 0."""
        return Moments(name, tuple(shape), lambda box: torch.zeros(box_shape(box)))

    def windows(self, elements: int) -> Iterator[Box]:
        """Boxes of at most `elements` elements that together cover the tensor."""
        for box in self.stored or (tuple((0, size) for size in self.shape),):
            yield from _windows(box, elements)


def _reader(tensor: Tensor) -> Read:
    return lambda box: tensor.detach()[tuple(slice(*interval) for interval in box)].cpu()


def _windows(box: Box, elements: int) -> Iterator[Box]:
    """Split a box into boxes of at most `elements` elements, along its outermost dims."""
    if prod(box_shape(box)) <= elements:
        yield box
        return
    (start, stop), rest = box[0], box[1:]
    rows = elements // prod(box_shape(rest))
    for lo in range(start, stop, max(1, rows)):
        hi = min(stop, lo + max(1, rows))
        for inner in [rest] if rows else _windows(rest, elements):
            yield ((lo, hi), *inner)


def moments_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Moments]:
    """The state of a torch AdamW (or Adam) over plain parameters of any model; nothing is copied.

    Frozen parameters are left out; those that never had a gradient are `Moments.without_state`. Raises ValueError if no
    parameter has second moments, or if one does not have one per element.
    """
    names = {param: name for name, param in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                continue
            state = optimizer.state.get(param, {})
            if (second := state.get("exp_avg_sq")) is None:
                found.append(Moments.without_state(names[param], param.shape))
                continue
            if second.shape != param.shape:
                raise ValueError(f"{names[param]} has second moments of shape {tuple(second.shape)}: {_NEEDED}")
            options = {"step": float(state["step"]), "betas": tuple(group["betas"]), "eps": float(group["eps"])}
            found.append(Moments.of(names[param], second, state["exp_avg"], **options))
    if all(moments.first is None for moments in found):
        reason = f"no trainable parameter of {type(optimizer).__name__} has an exp_avg_sq"
        raise ValueError(f"{reason}: {_NEEDED}, after its first step")
    return found


def stored_moments(stored: Stored, shapes: Mapping[str, Sequence[int]]) -> list[Moments]:
    """The state of a model's parameters in torchtitan's checkpoint; tensors are read when they are needed.

    Parameters that have hyper-parameters there but no state never had a gradient: `Moments.without_state`.

    Args:
        stored: the checkpoint.
        shapes: of the model's trainable parameters.

    Raises:
        ValueError: the checkpoint is not AdamW's, or has other parameters.
    """
    kind = stored.optimizer()
    if kind is None:
        raise ValueError(
            f"{stored.path} has no optimizer state: it contains the model only (the last step is saved this way unless "
            f"checkpoint.last_save_model_only = false); {_NEEDED}"
        )
    if kind != "AdamW":
        content = (
            UPSTREAM_STATE
            if kind == "adam-mini"
            else "AdamMini's optimizer state, which has only the means over its blocks"
        )
        raise ValueError(f"{stored.path} contains {content}; {_NEEDED}")
    stored.check_files()
    with_state = set(stored.parameters())
    without_state = {name for name in shapes if name not in with_state and _group(name) + "betas" in stored}
    check_parameters(stored, shapes.keys() - without_state)
    return [
        Moments.without_state(name, shape) if name in without_state else _stored(stored, name, tuple(shape))
        for name, shape in shapes.items()
    ]


def _group(name: str) -> str:
    return f"{_OPTIMIZER}{GROUPS}{name}."


def _stored(stored: Stored, name: str, shape: tuple[int, ...]) -> Moments:
    state, group = f"{_OPTIMIZER}{STATE}{name}", _group(name)
    entry = stored.tensors[state + EXP_AVG_SQ]
    if tuple(entry.size) != shape:
        raise ValueError(f"{name} is {tuple(entry.size)} in {stored.path} and {shape} in the configuration's model")
    return Moments(
        name,
        shape,
        lambda box: stored.window(state + EXP_AVG_SQ, box),
        lambda box: stored.window(state + EXP_AVG, box),
        float(stored.value(state + ".step")),
        tuple(stored.value(group + "betas")),
        float(stored.value(group + "eps")),
        tuple(
            tuple((lo, lo + size) for lo, size in zip(chunk.offsets, chunk.sizes, strict=True))
            for chunk in entry.chunks
        ),
    )
