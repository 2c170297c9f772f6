"""torchtitan's built-in models and flavours, on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch


def flavours(model: str) -> dict[str, Any]:
    """The model's class and its flavours; skips, with the reason, where the model cannot be imported."""
    pytest.importorskip("torchtitan", reason="needs torchtitan")
    from torchtitan.protocols.train_spec import get_train_spec

    try:
        spec = get_train_spec(model)
    except ImportError as error:
        if model != "flux":
            raise
        pytest.skip(f"torchtitan's flux cannot be imported here: {error}")
    return {"model_cls": spec.model_cls, "flavours": spec.model_args}


def shapes_of(model_cls: Any, args: Any) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    args = copy.deepcopy(args)
    if hasattr(args, "kv_lora_rank"):
        args.moe_impl = "standard"  # torchtitan sets it from the job config
    with torch.device("meta"):
        model = model_cls(args)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}
