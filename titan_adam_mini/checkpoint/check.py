"""Checks that a checkpoint fits the state to be loaded, from its metadata, before anything is read.

torch's distributed checkpoint reads into the live tensors, file by file: an error half way leaves a model that is
neither the old nor the new one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, Placement

from ..private import _compute_local_shape_and_global_offset, flatten_state_dict
from ..sharding import Shard, box_shape, shard_of
from ..state import CONVERT, SECOND_MOMENTS, UPSTREAM_STATE
from .stored import EXP_AVG, EXP_AVG_SQ, STATE, Stored

_SHOWN = 3
MIXED_UP = (
    "torch's distributed checkpoint would mix up the rows of {}: FSDP and tensor parallelism do not divide them. "
    "Choose degrees whose product divides the number of rows, or train without checkpoints"
)


def check_checkpoint(path: str | Path | Stored, state_dict: Mapping[str, Any]) -> None:
    """Compare a checkpoint folder with the state dict that `torch.distributed.checkpoint.load` is to fill.

    Reads the metadata and the sizes of the files, no data, and changes nothing.

    Args:
        path: the folder, such as `checkpoint/step-1000`.
        state_dict: nested or flat, with tensors, DTensors, objects and Stateful parts, as given to `load`.

    Raises:
        ValueError: a file is missing or truncated, an entry is missing, a tensor has another size, the optimizer state
            is AdamW's, the authors' adam-mini's, or of another partition; or see `check_savable`.
    """
    stored = path if isinstance(path, Stored) else Stored(path)
    plain = {key: part.state_dict() if isinstance(part, Stateful) else part for key, part in state_dict.items()}
    wanted, _ = flatten_state_dict(plain)
    stored.check_files()
    check_savable(wanted)
    for prefix in sorted({name.partition(STATE)[0] for name in wanted if _is_second_moment(name)}):
        _check_optimizer(stored, prefix, wanted)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ValueError(f"{stored.path} has no {some(missing)}, which this run needs")
    other = []
    for name, value in wanted.items():
        if isinstance(value, Tensor) and name in stored.tensors and stored.tensors[name].size != value.size():
            other.append(f"{name} is {tuple(stored.tensors[name].size)} there and {tuple(value.size())} here")
    if other:
        raise ValueError(f"{stored.path} is from another model: {some(other)}")


def check_savable(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for tensors that torch's distributed checkpoint would silently save or load wrongly.

    If FSDP cuts rows that tensor parallelism has already cut unevenly, it mixes up the rows of some ranks
    (`_compute_local_shape_and_global_offset` of torch 2.13 disagrees with the local tensor). No communication.

    Args:
        state_dict: flat, name -> DTensor or anything else.
    """
    wrong = []
    for name, value in state_dict.items():
        if not isinstance(value, DTensor):
            continue
        coordinate = value.device_mesh.get_coordinate()
        assert coordinate is not None
        if mixes_up(shard_of(value), value.placements, value.device_mesh.shape, coordinate):
            wrong.append(f"{name} {tuple(value.shape)} as {value.placements}")
    if wrong:
        raise ValueError(MIXED_UP.format(some(wrong)))


def mixes_up(
    shard: Shard, placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> bool:
    """Whether torch's distributed checkpoint would use wrong elements for the rank at `coordinate`. Pure function.

    Args:
        shard: the rank's actual shard, for these placements on a mesh of this shape.
    """
    box = shard.box()
    sizes, offsets = _compute_local_shape_and_global_offset(shard.shape, mesh_shape, list(coordinate), placements)
    theirs = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
    return box_shape(box) != tuple(sizes) or (box != theirs and math.prod(sizes) > 0)


def _is_second_moment(name: str) -> bool:
    return STATE in name and name.endswith(EXP_AVG_SQ)


def _check_optimizer(stored: Stored, prefix: str, wanted: Mapping[str, Any]) -> None:
    """The checks of optimizer state; `wanted` is that of AdamMini, or AdamW's to be converted."""
    start = prefix + STATE
    grids = {name: value for name, value in wanted.items() if name.startswith(start) and name.endswith(EXP_AVG_SQ)}
    firsts = {name: wanted.get(name.removesuffix(EXP_AVG_SQ) + EXP_AVG) for name in grids}
    elementwise = all(first is not None and first.size() == grids[name].size() for name, first in firsts.items())
    kind = stored.optimizer(prefix)
    if kind is None:
        raise ValueError(
            f"{stored.path} has no optimizer state under {prefix!r}: it contains only a model. torchtitan writes such "
            "checkpoints at the last step unless checkpoint.last_save_model_only = false; load only the model with "
            "--checkpoint.initial_load_path, or use an earlier step"
        )
    if kind == "adam-mini":
        raise ValueError(
            f"{stored.path} has {UPSTREAM_STATE} (--checkpoint.initial_load_path, or exclude_from_loading optimizer)"
        )
    if kind == "AdamW" and not elementwise:
        raise ValueError(
            f"{stored.path} contains AdamW's optimizer state, with one second moment per element: {CONVERT}"
        )
    if kind == "AdamMini" and elementwise and len(grids) > 1:
        raise ValueError(f"{stored.path} contains AdamMini's optimizer state, not AdamW's: leave out load_adamw_state")
    _check_factors(stored, start, wanted)
    missing = [name.removeprefix(start) for name in grids if name not in stored]
    if missing:
        known = set(stored.parameters(prefix))
        extra = sorted(known - {name.removeprefix(start).removesuffix(EXP_AVG_SQ) for name in grids})
        hint = f" It has {some(extra)}, which this run does not have." if extra else ""
        raise ValueError(f"{stored.path} has no optimizer state for {some(missing)}: it is from another model.{hint}")
    other = []
    for name, value in grids.items():
        first = firsts[name]
        same = first is None or stored.tensors[name.removesuffix(EXP_AVG_SQ) + EXP_AVG].size == first.size()
        if same and stored.tensors[name].size != value.size():
            other.append(
                f"{name.removeprefix(start)} is {tuple(stored.tensors[name].size)} there and {tuple(value.size())} here"
            )
    if other:
        raise ValueError(
            f"{stored.path} was saved with another partition: {some(other)}. Give this run the head counts, roles and "
            "value_blocks of the run that saved it, or start from AdamW's state to change the partition"
        )
    _check_momentum(stored, prefix, wanted)


def _check_factors(stored: Stored, start: str, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if a second moment is factored here but not in the checkpoint, or vice versa."""
    suffix = "." + SECOND_MOMENTS[1]
    there, here = (
        {
            name.removeprefix(start).removesuffix(suffix)
            for name in names
            if name.startswith(start) and name.endswith(suffix)
        }
        for names in (stored.tensors, wanted)
    )
    here_only, there_only = sorted(here - there), sorted(there - here)
    for where, names in (("here but not there", here_only), ("there but not here", there_only)):
        if names:
            raise ValueError(
                f"{stored.path} was saved with another second moment: that of {some(names)} is factored {where}. Give "
                "this run the second_moment and roles of the run that saved it, or start from AdamW's state to change "
                "them"
            )


def _check_momentum(stored: Stored, prefix: str, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if momentum is int8 there and a float here, or vice versa: torch would cast it."""
    other = []
    for name, kind in stored.kinds(prefix).items():
        live = wanted.get(prefix + STATE + name + EXP_AVG)
        if live is not None and torch.int8 in {kind.momentum, live.dtype} and kind.momentum != live.dtype:
            there, here = (str(dtype).removeprefix("torch.") for dtype in (kind.momentum, live.dtype))
            other.append(f"{name} has momentum in {there} there and in {here} here")
    if other:
        raise ValueError(
            f"{stored.path} has another momentum dtype: {some(other)}. torch would cast the raw numbers. torchtitan "
            "runs convert it; elsewhere load it into an optimizer with the checkpoint's momentum_dtype, and pass the "
            "state_dict() of that to load_state_dict() of this one"
        )


def check_parameters(stored: Stored, names: Collection[str]) -> None:
    """Raise ValueError if the checkpoint does not have optimizer state for exactly these parameters."""
    known = set(stored.parameters())
    for problem, different in (
        ("has state for {} that the configuration's model does not have", known - set(names)),
        ("has no state for {} of the configuration's model", set(names) - known),
    ):
        if different:
            problem = problem.format(some(sorted(different)))
            raise ValueError(f"{stored.path} {problem}: is this the configuration of that run?")


def some(words: list[str]) -> str:
    """The first few words, and the number of the others."""
    rest = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + rest
