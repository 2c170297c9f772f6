"""The unsharded model of a torchtitan configuration: the blocks and group keys that its checkpoints have."""

from typing import Any

import torch

from titan_adam_mini.offline.build import spec_and_args
from titan_adam_mini.partition import Blocks, Partition, clean_name
from titan_adam_mini.titan.builder import optimizer_of


class _Unsharded:
    """The only attribute of torchtitan's ParallelDims that builders read, for an unsharded model."""

    pp_enabled = False


def target_of(config: Any, to: str) -> tuple[dict[str, Blocks], dict[str, Any], torch.dtype | None]:
    """The blocks of every trainable parameter, the keys and values of a new optimizer's parameter group, and
    AdamMini's `momentum_dtype`.

    Builds the model on the meta device: it takes no memory.

    Args:
        config: torchtitan's job configuration, from `configured`.
        to: "adam_mini" or "adamw".

    Raises:
        ValueError: AdamMini cannot be built from the configuration.
    """
    model = model_on_meta(config)
    optimizer = optimizer_of(model, config.optimizer, _Unsharded())
    assigned = {blocks.name: blocks for blocks in optimizer.partition.assign(_shapes(model)).values()}
    if to == "adamw":
        flags = {"fused": config.optimizer.implementation == "fused"}
        flags["foreach"] = config.optimizer.implementation == "foreach"
        target: torch.optim.Optimizer = torch.optim.AdamW([torch.zeros(1)], lr=config.optimizer.lr, **flags)
    else:
        target = optimizer
    group = {key: value for key, value in target.param_groups[0].items() if key not in ("params", "param_names")}
    return assigned, group, optimizer.momentum_dtype


def partition_of(config: Any) -> tuple[str, Partition, dict[str, tuple[int, ...]]]:
    """A model's name and flavor, AdamMini's partition of it, and the shapes of its trainable parameters.

    Builds the model on the meta device: it takes no memory. `config` and errors are those of `target_of`.
    """
    model = model_on_meta(config)
    partition = optimizer_of(model, config.optimizer, _Unsharded()).partition
    return f"{config.model.name} {config.model.flavor}", partition, _shapes(model)


def model_on_meta(config: Any) -> torch.nn.Module:
    """The full model of a torchtitan job configuration, with parameters on the meta device."""
    spec, args = spec_and_args(config)
    args.update_from_config(config)
    with torch.device("meta"):
        model: torch.nn.Module = spec.model_cls(args)
    return model


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {clean_name(name): tuple(param.shape) for name, param in model.named_parameters() if param.requires_grad}
