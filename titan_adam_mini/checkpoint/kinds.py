"""Loading optimizer state of another dtype or layout: tensors like the checkpoint's to load into, then conversion.

torch's distributed checkpoint reads into the live tensors and silently casts other dtypes, also int8 without its
scales. So a load uses tensors like those in the checkpoint, and converts afterwards. State dicts here are flat, as
returned by torch with `flatten_optimizer_state_dict=True`.
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
    """The optimizer state of a run, with new tensors where the checkpoint has another kind, else the live tensors.

    Args:
        state: the state of AdamMini.
        kinds: parameter -> its kind in the checkpoint, elementwise only if AdamW's state is to be converted.

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
                raise ValueError(f"the checkpoint has int8 momentum for {name!r}, but {error}") from None
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
    """State loaded into `as_stored`, with momentum converted to this run's dtype. Second moments are unchanged.

    Args:
        state: the loaded state.
        expected: parameter -> state of this run, as in `optimizer.state`.
        conversions: counts the conversions.
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
