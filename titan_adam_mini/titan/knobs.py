"""Validation of ``[optimizer.adam_mini]``: torchtitan does not check TOML values in its job config."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from titan_adam_mini.momentum import TYPES
from titan_adam_mini.partition import SECOND_MOMENTS, VALUE_BLOCKS

_MOMENTUM_DTYPES = {"": None, **TYPES}
_HYPER_PARAMETERS = ("checkpoint", "config")


@dataclass(frozen=True)
class Knobs:
    """Validated settings of ``[optimizer.adam_mini]``; ``job_config.AdamMini`` documents them."""

    roles: dict[str, str] = field(default_factory=dict)
    undecayed: list[str] = field(default_factory=list)
    value_blocks: str = "neuron"
    second_moment: str = "blocks"
    momentum_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    load_adamw_state: bool = False
    hyper_parameters: str = "checkpoint"
    log_memory: bool = False


def read_knobs(optimizer_config: Any) -> Knobs:
    """Validate ``optimizer_config.adam_mini`` and return its values; defaults if the section does not exist.

    Raises:
        ValueError: naming the setting, the value and the valid values.
    """
    section = getattr(optimizer_config, "adam_mini", None)
    if section is None:
        return Knobs()
    values = dict(section) if isinstance(section, dict) else vars(section)
    known = [f.name for f in fields(Knobs)]
    for name in values:
        if name not in known:
            raise ValueError(f"[optimizer.adam_mini] has no setting {name!r}: valid settings are {', '.join(known)}.")

    roles = values.get("roles", {})
    if not isinstance(roles, dict) or not all(_is_text(k) and _is_text(v) for k, v in roles.items()):
        raise _refusal("roles", roles, 'a table of name patterns and roles, such as {"*.adapter.weight" = "neuron"}')
    undecayed = values.get("undecayed", [])
    if not isinstance(undecayed, list | tuple) or not all(isinstance(pattern, str) for pattern in undecayed):
        raise _refusal("undecayed", undecayed, 'a list of name patterns or roles, such as ["norm", "*.bias"]')
    value_blocks = values.get("value_blocks", "neuron")
    if value_blocks not in VALUE_BLOCKS:
        raise _refusal("value_blocks", value_blocks, '"neuron" or "tensor"')
    second_moment = values.get("second_moment", "blocks")
    if second_moment not in SECOND_MOMENTS:
        raise _refusal("second_moment", second_moment, '"blocks", "channels" or "factored"')
    momentum_dtype = values.get("momentum_dtype", "")
    if not isinstance(momentum_dtype, str) or momentum_dtype not in _MOMENTUM_DTYPES:
        raise _refusal("momentum_dtype", momentum_dtype, '"" (the parameter\'s type), "float32", "bfloat16" or "int8"')
    flags = {name: values.get(name, False) for name in ("stochastic_rounding", "load_adamw_state", "log_memory")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise _refusal(name, flag, "true or false")
    hyper_parameters = values.get("hyper_parameters", "checkpoint")
    if hyper_parameters not in _HYPER_PARAMETERS:
        raise _refusal("hyper_parameters", hyper_parameters, '"checkpoint" or "config"')
    return Knobs(
        roles=dict(roles),
        # The command line gives [""] for an empty string, which means an empty list.
        undecayed=[pattern.strip() for pattern in undecayed if pattern.strip()],
        value_blocks=value_blocks,
        second_moment=second_moment,
        momentum_dtype=_MOMENTUM_DTYPES[momentum_dtype],
        hyper_parameters=hyper_parameters,
        **flags,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _refusal(name: str, value: Any, valid: str) -> ValueError:
    return ValueError(f"[optimizer.adam_mini] {name} = {value!r} is not valid: it must be {valid}.")
