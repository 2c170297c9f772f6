"""Optimizer state in the kind in which a checkpoint holds it: room for it before the load, our own kind afterwards.

torch's distributed checkpoint reads into the live tensors and casts what is of another type, int8 without its scales
too, without a word. So a load asks for what is there, and converts then. State dicts here are flat, as torch gives
them with `flatten_optimizer_state_dict=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import int8
from ..momentum import Conversions, converted, empty_momentum
from ..sharding import as_state, local
from ..state import SECOND_MOMENTS
from .stored import EXP_AVG, EXP_AVG_SCALE, EXP_AVG_SQ, STATE, Kind

MOMENTUM = (EXP_AVG, EXP_AVG_SCALE)


def as_stored(state: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The optimizer state of a run with room for what the checkpoint holds; what is of one kind stays the live tensor.

    Args:
        state: the state of AdamMini.
        kinds: parameter -> its kind in the checkpoint, elementwise only where AdamW's state is to be taken.

    Raises:
        ValueError: naming the parameter, if the checkpoint has int8 momentum and this mesh cuts its runs.
    """
    state = dict(state)
    for name, kind in kinds.items():
        start = STATE + name
        live = state.get(start + EXP_AVG)
        if not isinstance(live, Tensor):
            continue
        if live.dtype != kind.momentum and (kind.momentum != torch.int8 or int8.fits(live.shape)):
            try:
                fresh = empty_momentum(live, kind.momentum)
            except ValueError as error:
                raise ValueError(f"the checkpoint holds {name!r} with int8 momentum, and here {error}") from None
            state.pop(start + EXP_AVG_SCALE, None)
            state |= {f"{start}.{key}": value for key, value in fresh.items()}
        if kind.elementwise:
            for key in SECOND_MOMENTS:
                state.pop(f"{start}.{key}", None)
            data, same = torch.empty_like(local(live), dtype=kind.second), getattr(live, "placements", ())
            state[start + EXP_AVG_SQ] = as_state(data, live, live.shape, same, live.stride())
    return state


def as_expected(
    state: Mapping[str, Any], expected: Mapping[str, Mapping[str, Tensor]], conversions: Conversions
) -> dict[str, Any]:
    """What was loaded into `as_stored`, with momentum as this run keeps it. Second moments are left as they are.

    Args:
        state: what was loaded.
        expected: parameter -> state of this run, as `optimizer.state` has it.
        conversions: where conversions are counted.
    """
    state = dict(state)
    for name, own in expected.items():
        keys = {key: STATE + name + key for key in MOMENTUM}
        loaded = {key.removeprefix("."): state[full] for key, full in keys.items() if full in state}
        for full in keys.values():
            state.pop(full, None)
        try:
            new = converted(own, loaded, conversions)
        except ValueError as error:
            raise ValueError(f"the loaded state of {name!r} {error}") from None
        state |= {f"{STATE}{name}.{key}": value for key, value in new.items()}
    return state
