"""From torchtitan's ``[optimizer]`` section to AdamMini: one optimizer per model part, in torchtitan's container."""

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
"""Key of the names in torch's parameter groups, as a flat state dict ends in it."""


class AdamMiniContainer(OptimizersContainer):
    """torchtitan's container around one AdamMini per model part; saving and loading are torchtitan's own.

    Args:
        model_parts: the parallelised model parts of this rank.
        optimizers: one per model part, with all its trainable parameters.
        knobs: what the checkpointer needs to know, `load_adamw_state` and `hyper_parameters`, and the metrics,
            `log_memory`.

    Attributes:
        checkpoint_layout: parameter -> its kind in the checkpoint that the next load is from: state dicts have room for
            that, and what is loaded is converted.
    """

    def __init__(self, model_parts: list[Any], optimizers: list[AdamMini], knobs: Knobs) -> None:
        self.load_adamw_state, self.hyper_parameters = knobs.load_adamw_state, knobs.hyper_parameters
        self.log_memory = knobs.log_memory
        self.checkpoint_layout: dict[str, Kind] = {}
        self.model_parts = model_parts
        self.optimizers = optimizers
        self._validate_length(len(model_parts))
        for optimizer in optimizers:
            # Made here, on every rank at once: a checkpoint then finds the state without a trial step.
            optimizer.init_state()
        params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
        self._post_init(params, optimizers[0].defaults)

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's; before a load with room for the checkpoint's kind of momentum, and for AdamW's moments."""
        # torch writes the list of all names beside each of them; a name is in its own key already.
        state = {key: value for key, value in super().state_dict().items() if not key.endswith(_PARAM_NAMES)}
        return as_stored(state, self.checkpoint_layout) if self.checkpoint_layout else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torchtitan's; what is of another kind in `checkpoint_layout` is converted first, which is collective for
        AdamW's second moments: they are averaged over the blocks."""
        if self.checkpoint_layout:
            conversions: Conversions = Counter()
            averaged = []
            with failing_together("convert the optimizer state that was loaded"):
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
        ValueError: a setting that AdamMini cannot serve, or a model whose heads nobody names; in words, with the cure.
            On every rank, also where it is the model part of another one, a pipeline stage, that cannot be served.
    """
    with failing_together("build AdamMini"):
        check_settings(optimizer_config, fault_tolerant=ft_manager is not None and ft_manager.enabled)
        optimizers = [optimizer_of(part, optimizer_config, parallel_dims, partition) for part in model_parts]
        knobs = read_knobs(optimizer_config)
        if knobs.log_memory:
            metrics.install()
    return AdamMiniContainer(model_parts, optimizers, knobs)


def check_settings(optimizer_config: Any, *, fault_tolerant: bool) -> None:
    """Raise ValueError, in words, for settings that AdamMini cannot serve.

    Args:
        optimizer_config: torchtitan's ``[optimizer]`` section.
        fault_tolerant: does the run use torchft?
    """
    if optimizer_config.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true cannot serve AdamMini: it steps each parameter alone inside the "
            "backward pass, while a block's second moment is completed over all ranks once per step. Set "
            "optimizer.early_step_in_backward = false."
        )
    if fault_tolerant:
        raise ValueError(
            "fault_tolerance.enable = true (torchft) cannot serve AdamMini: torchft changes the set of replicas "
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
    """AdamMini for one model part, without state yet: on the meta device too, where its table can be looked at.

    `momentum_dtype` stands in for the configuration's.
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
    """The partition of a torchtitan model, whose ``model_args`` hold its head counts.

    A pattern of the user's that matches no parameter is an error, but not where the part is one pipeline stage of
    several (``staged``), since it may be another stage's, and not where all that it matches is frozen.
    """
    model_args = getattr(part, "model_args", None)
    if model_args is None:
        raise ValueError(
            f"AdamMini cannot tell the number of heads of {type(part).__name__}: it has no `model_args`, where "
            "torchtitan's models keep it. Set `self.model_args` in the model, or give the TrainSpec "
            "`build_optimizers_fn=functools.partial(titan_adam_mini.titan.build_optimizers, partition=...)` with a "
            "titan_adam_mini.Partition of your own."
        )

    def partition(roles: dict[str, str], undecayed: list[str]) -> Partition:
        return Partition.from_config(
            model_args,
            value_blocks=knobs.value_blocks,
            roles=roles,
            undecayed=undecayed,
            second_moment=knobs.second_moment,
        )

    whole = partition(knobs.roles, knobs.undecayed)
    trainable = [name for name, param in part.named_parameters() if param.requires_grad]
    elsewhere = set(whole.unused(trainable))
    if not staged:
        elsewhere -= set(whole.unused(name for name, _ in part.named_parameters()))
    return partition(
        {pattern: role for pattern, role in knobs.roles.items() if pattern not in elsewhere},
        [pattern for pattern in knobs.undecayed if pattern not in elsewhere],
    )
