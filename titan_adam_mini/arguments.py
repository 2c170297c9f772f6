"""Validation of AdamMini's arguments: unsupported ones, exclusive options, bounds of hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES_NEEDED = (
    "AdamMini divides a parameter into blocks by its name: pass model.named_parameters() instead of "
    "model.parameters(), or param groups whose 'params' are (name, parameter) pairs, or that have 'param_names'"
)
OPTIMIZER_OPTIONS = {
    *("n_heads", "n_kv_heads", "head_dim", "partition", "value_blocks", "second_moment"),
    *("momentum_dtype", "stochastic_rounding", "seed"),
}
"""Options that apply to all groups."""
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8, torch.float16, torch.float64)
UNSUPPORTED = {
    "amsgrad": "AdamMini has no amsgrad variant; leave amsgrad out",
    "differentiable": "AdamMini updates in place and cannot be differentiated through; leave differentiable out",
    "dim": "AdamMini reads sizes from the parameters; leave dim out",
    "model_sharding": "AdamMini detects how parameters are sharded; leave model_sharding out",
    "verbose": "AdamMini logs through logging.getLogger('titan_adam_mini'); leave verbose out",
}


def refuse_unsupported(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for unsupported arguments of AdamW or the authors' adam-mini, TypeError for unknown ones."""
    for name, value in arguments.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"AdamMini got an unknown argument {name!r}")
        if value or name not in ("amsgrad", "differentiable"):
            raise ValueError(UNSUPPORTED[name])


def check_options(foreach: bool | None, fused: bool | None, momentum_dtype: torch.dtype | None) -> None:
    """Raise ValueError for invalid options."""
    if foreach and fused:
        raise ValueError("foreach=True and fused=True cannot be combined; pass one of them, or neither")
    if momentum_dtype not in MOMENTUM_DTYPES:
        raise ValueError(f"momentum_dtype must be one of {', '.join(map(str, MOMENTUM_DTYPES))}, not {momentum_dtype}")


def check_hyper_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the value, if a hyper-parameter of a group is out of bounds."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Invalid lr: a tensor of shape {tuple(lr.shape)}; pass a float or a 0-d tensor")
    for name, value, valid in (
        ("lr", lr, float(lr) >= 0),
        ("betas[0]", beta1, 0 <= beta1 < 1),
        ("betas[1]", beta2, 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] > 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
    ):
        if not valid:
            raise ValueError(f"Invalid {name}: {value}")
