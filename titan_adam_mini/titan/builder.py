"""Builds AdamMini from torchtitan's ``[optimizer]`` section: one optimizer per model part, in one container."""

from collections import Counter
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.checkpoint.kinds import as_expected, as_stored
from titan_adam_mini.checkpoint.stored import EXP_AVG_SQ, GROUPS, STATE, Kind
from titan_adam_mini.momentum import Conversions, log_conversions
from titan_adam_mini.partition import clean_name
from titan_adam_mini.titan import metrics
from titan_adam_mini.titan.all_ranks import failing_together
from titan_adam_mini.titan.knobs import Knobs, read_knobs

NAME = "AdamMini"
_PARAM_NAMES = ".param_names"
"""Suffix, in flat state dicts, of the key of names in torch's parameter groups."""


class AdamMiniContainer(OptimizersContainer):
    """torchtitan's container around one AdamMini per model part; saving and loading are torchtitan's own.

    Args:
        model_parts: the parallelised model parts of this rank.
        optimizers: one per model part, with all its trainable parameters.
        knobs: `load_adamw_state` and `hyper_parameters` are used by the checkpointer, `log_memory` by the metrics.

    Attributes:
        checkpoint_layout: parameter -> its kind in the checkpoint to be loaded next: state dicts then have tensors of
            that kind, and loaded state is converted.
    """

    def __init__(self, model_parts: list[Any], optimizers: list[AdamMini], knobs: Knobs) -> None:
        self.load_adamw_state, self.hyper_parameters = knobs.load_adamw_state, knobs.hyper_parameters
        self.log_memory = knobs.log_memory
        self.checkpoint_layout: dict[str, Kind] = {}
        self.model_parts = model_parts
        self.optimizers = optimizers
        self._validate_length(len(model_parts))
        for optimizer in optimizers:
            # Create the state here, on all ranks: torchtitan's checkpoint loading then needs no trial step.
            optimizer.init_state()
        params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
        self._post_init(params, optimizers[0].defaults)

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's; before a load, with tensors for the checkpoint's momentum dtype, and for AdamW's moments."""
        # torch stores the list of all names once per name; the name is already in its own key.
        state = {key: value for key, value in super().state_dict().items() if not key.endswith(_PARAM_NAMES)}
        return as_stored(state, self.checkpoint_layout) if self.checkpoint_layout else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torchtitan's; state of another kind in `checkpoint_layout` is converted first, which is collective for
        AdamW's second moments: they are averaged over the blocks."""
        if self.checkpoint_layout:
            conversions: Conversions = Counter()
            averaged = []
            with failing_together("convert the loaded optimizer state"):
                for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
                    named = [(clean_name(name), param) for name, param in part.named_parameters()]
                    names = {param: name for name, param in named if param in optimizer.state}
                    own = {name: optimizer.state[param] for param, name in names.items()}
                    state_dict = as_expected(state_dict, own, conversions)
                    if any(self.checkpoint_layout[name].elementwise for name in own):
                        second = {param: state_dict[STATE + name + EXP_AVG_SQ] for param, name in names.items()}
                        averaged.append((optimizer, names, second))
            for optimizer, names, second in averaged:
                for param, means in optimizer.block_means(second).items():
                    state_dict |= {f"{STATE}{names[param]}.{key}": value for key, value in means.items()}
            log_conversions(conversions)
        param_names = {
            f"{GROUPS}{clean_name(name)}{_PARAM_NAMES}": group["param_names"]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        super().load_state_dict({**state_dict, **param_names})


def build_adam_mini(
    model_parts: list[Any],
    optimizer_config: Any,
    parallel_dims: Any,
    ft_manager: Any = None,
    *,
    partition: Partition | None = None,
) -> AdamMiniContainer:
    """Build AdamMini for every model part of this rank; the arguments are those of ``register.build_optimizers``.

    Raises:
        ValueError: a setting that AdamMini does not support, or a model with unknown head counts; with a fix. Raised on
            every rank, also if only the model part (pipeline stage) of another rank is affected.
    """
    with failing_together("build AdamMini"):
        check_settings(optimizer_config, fault_tolerant=ft_manager is not None and ft_manager.enabled)
        optimizers = [optimizer_of(part, optimizer_config, parallel_dims, partition) for part in model_parts]
        knobs = read_knobs(optimizer_config)
        if knobs.log_memory:
            metrics.install()
    return AdamMiniContainer(model_parts, optimizers, knobs)


def check_settings(optimizer_config: Any, *, fault_tolerant: bool) -> None:
    """Raise ValueError for settings that AdamMini does not support.

    Args:
        optimizer_config: torchtitan's ``[optimizer]`` section.
        fault_tolerant: whether the run uses torchft.
    """
    if optimizer_config.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true is not supported by AdamMini: it steps each parameter separately "
            "in the backward pass, while AdamMini reduces second moments over all ranks once per step. Set "
            "optimizer.early_step_in_backward = false."
        )
    if fault_tolerant:
        raise ValueError(
            "fault_tolerance.enable = true (torchft) is not supported by AdamMini: torchft changes the set of replicas "
            "between steps, while AdamMini plans its exchange once per run. Set fault_tolerance.enable = false, or "
            "train with AdamW under torchft."
        )


def optimizer_of(
    part: torch.nn.Module,
    optimizer_config: Any,
    parallel_dims: Any,
    partition: Partition | None = None,
    momentum_dtype: torch.dtype | None = None,
) -> AdamMini:
    """AdamMini for one model part, without state yet; also on the meta device, to show its table.

    `momentum_dtype` overrides the configuration's.
    """
    implementation = optimizer_config.implementation
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"optimizer.implementation = {implementation!r} is unknown: valid values are "
            f"{', '.join(repr(name) for name in _IMPLEMENTATIONS)}."
        )
    knobs = read_knobs(optimizer_config)
    return AdamMini(
        [(name, param) for name, param in part.named_parameters() if param.requires_grad],
        lr=optimizer_config.lr,
        betas=(optimizer_config.beta1, optimizer_config.beta2),
        eps=optimizer_config.eps,
        weight_decay=optimizer_config.weight_decay,
        partition=partition or _partition_of(part, knobs, staged=parallel_dims.pp_enabled),
        momentum_dtype=momentum_dtype or knobs.momentum_dtype,
        stochastic_rounding=knobs.stochastic_rounding,
        foreach=implementation == "foreach",
        fused=implementation == "fused",
    )


_IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


def _partition_of(part: torch.nn.Module, knobs: Knobs, *, staged: bool) -> Partition:
    """The partition of a torchtitan model, with head counts from its ``model_args``.

    A custom pattern that matches no parameter is an error, unless the part is one of several pipeline stages
    (``staged``), since it may match in another stage, or all parameters that it matches are frozen.
    """
    model_args = getattr(part, "model_args", None)
    if model_args is None:
        raise ValueError(
            f"AdamMini cannot determine the number of heads of {type(part).__name__}: it has no `model_args`, which "
            "torchtitan's models have. Set `self.model_args` in the model, or give the TrainSpec "
            "`build_optimizers_fn=functools.partial(titan_adam_mini.titan.build_optimizers, partition=...)` with your "
            "own titan_adam_mini.Partition."
        )

    def partition(roles: dict[str, str], undecayed: list[str]) -> Partition:
        return Partition.from_config(
            model_args,
            value_blocks=knobs.value_blocks,
            roles=roles,
            undecayed=undecayed,
            second_moment=knobs.second_moment,
        )

    complete = partition(knobs.roles, knobs.undecayed)
    trainable = [name for name, param in part.named_parameters() if param.requires_grad]
    elsewhere = set(complete.unused(trainable))
    if not staged:
        elsewhere -= set(complete.unused(name for name, _ in part.named_parameters()))
    return partition(
        {pattern: role for pattern, role in knobs.roles.items() if pattern not in elsewhere},
        [pattern for pattern in knobs.undecayed if pattern not in elsewhere],
    )
