"""Named parameters in torch's parameter groups: each group has its names under `param_names`, as in torch's own
optimizers, and a name stays attached to its parameter through every edit of `param_groups`."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from .arguments import NAMES_NEEDED, OPTIMIZER_OPTIONS
from .partition import clean_name
from .sharding import refuse_flat

Group = dict[str, Any]
Named = list[tuple[str, Tensor, Group]]
"""(name, parameter, group) of every parameter, in order."""


def named_group(param_group: Group) -> Group:
    """A copy of a group with `params` a list of tensors and `param_names` their names.

    Raises:
        TypeError: the group is not a dict, or its parameters have no order.
        ValueError: a name is missing, or an option of the entire optimizer is set for a group.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    group = dict(param_group)
    params = group["params"]
    if isinstance(params, set | frozenset):
        raise TypeError(
            "optimizer parameters need an order that stays the same between runs, and a set has none; use a list"
        )
    for option in OPTIMIZER_OPTIONS.intersection(group):
        raise ValueError(f"{option} applies to the entire optimizer, not to one group: pass it to AdamMini(...)")
    params = [params] if isinstance(params, Tensor) else list(params)
    listed = group.get("param_names", None if params else [])  # a pipeline stage may have no parameters of a group
    if params and all(isinstance(param, tuple) for param in params):
        group["param_names"] = [name for name, _ in params]
        params = [param for _, param in params]
    elif listed is None or any(isinstance(param, tuple) for param in params) or len(listed) != len(params):
        raise ValueError(NAMES_NEEDED)
    else:
        group["param_names"] = list(listed)
    group["params"] = params
    for name, param in zip(group["param_names"], params, strict=True):
        refuse_flat(name, param)
    return group


def named_parameters(groups: Sequence[Group], known: MutableMapping[Tensor, str], dims: dict[str, int]) -> Named:
    """All parameters with their names. Names are updated after parameters were moved, sorted or dropped.

    A tensor that is new in a group (a framework replaced the parameter) takes the name at its position.

    Args:
        groups: of the optimizer; their `param_names` are updated.
        known: parameter -> name, of all that were ever in a group; updated.
        dims: name -> number of dims, likewise.

    Raises:
        ValueError: the name of a tensor is unknown, or two have the same name.
    """
    named: Named = []
    places: dict[str, int] = {}
    for number, group in enumerate(groups):
        params, listed = group["params"], group.get("param_names", ())
        if any(param not in known for param in params) and len(listed) != len(params):
            raise ValueError(
                f"param_groups[{number}] has {len(params)} parameters and {len(listed)} names: {_changed_by()}"
            )
        for place, param in enumerate(params):
            name = known[param] if param in known else listed[place]
            if name in places:
                raise ValueError(f"two parameters are called {name!r}; names must be unique over all groups")
            places[name] = number
            named.append((name, param, group))
    for name, param, _ in named:
        refuse_flat(name, param)
        if dims.get(name, param.ndim) != param.ndim:
            raise ValueError(
                f"param_groups[{places[name]}] has a tensor of {param.ndim} dims in the place of {name!r}, which had "
                f"{dims[name]}: {_changed_by()}"
            )
    names = iter(name for name, _, _ in named)
    for group in groups:
        group["param_names"] = [next(names) for _ in group["params"]]
    known.update((param, name) for name, param, _ in named)
    dims.update((name, param.ndim) for name, param, _ in named)
    return named


def _changed_by() -> str:
    if "deepspeed" in sys.modules:
        return (
            "DeepSpeed ZeRO stages 1 to 3 replace parameters by flat partitions, which AdamMini cannot divide into "
            "blocks; use ZeRO stage 0"
        )
    return (
        "code that replaces parameters in param_groups must update `param_names` as well as `params`; a framework that "
        "replaces them by flat partitions cannot be used with AdamMini"
    )


def match_groups(groups: Sequence[Group], saved: Sequence[Group]) -> dict[Tensor, Any]:
    """Parameter -> its key in a state dict whose `param_groups` are `saved`.

    Groups match by position. Inside a group, parameters match by name if the state has names and its keys are numbers,
    as in torch's `state_dict()`; else by position. `torch.distributed.checkpoint` has already matched by name: its keys
    are names.

    Raises:
        ValueError: the groups, or the parameters in one of them, differ.
    """
    lengths = [len(group["params"]) for group in saved]
    if lengths != [len(group["params"]) for group in groups]:
        raise ValueError(
            f"the loaded state has groups with {lengths} parameters, this optimizer has groups with "
            f"{[len(group['params']) for group in groups]}"
        )
    keys: dict[Tensor, Any] = {}
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        own, theirs = [clean_name(name) for name in group["param_names"]], other.get("param_names")
        there = other["params"]
        if theirs is None or len(theirs) != len(there) or any(isinstance(key, str) for key in there):
            order = there
        else:
            key_of = dict(zip(map(clean_name, theirs), there, strict=True))
            if missing := [name for name in own if name not in key_of]:
                extra = [name for name in key_of if name not in set(own)]
                raise ValueError(
                    f"the loaded state has different parameters in group {number}: {some_of(extra)} instead of "
                    f"{some_of(missing)}; build the optimizer with the groups that were saved"
                )
            order = [key_of[name] for name in own]
        keys.update(zip(group["params"], order, strict=True))
    return keys


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
