"""torchtitan's checkpointer for AdamMini: checks that a checkpoint fits before it is read, prevents accidental starts
from random weights, converts AdamW's state and other momentum dtypes, and logs which hyper-parameters differ.

Methods of torchtitan's ``CheckpointManager`` are replaced; with other optimizers they call torchtitan's own.
"""

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer

from titan_adam_mini.checkpoint import check_checkpoint, check_savable
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.titan import replaced
from titan_adam_mini.titan.all_ranks import failing_together, gathered
from titan_adam_mini.titan.builder import AdamMiniContainer
from titan_adam_mini.titan.log import log_on_rank_0

_BASE = "initial_lr"
"""Key of the configuration's learning rate, which the schedule multiplies."""


def install() -> None:
    """Make torchtitan's CheckpointManager check what it loads and saves for AdamMini."""
    replaced.replace(CheckpointManager, "__init__", init_checked)
    replaced.replace(CheckpointManager, "load", load_checked)
    replaced.replace(CheckpointManager, "dcp_load", dcp_load_checked)
    replaced.replace(CheckpointManager, "save", save_together)
    replaced.replace(CheckpointManager, "dcp_save", dcp_save_together)


def init_checked(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps torchtitan's: refuses an `initial_load` setting that has no effect.

    Raises ValueError if the run would start from random weights although a checkpoint to start from is set.
    """
    original(manager, *args, **kwargs)
    if _is_ours(manager) and "checkpoint_config" in kwargs:
        start_of(kwargs["checkpoint_config"])


def load_checked(original: Any, manager: Any, step: int = -1) -> bool:
    """Wraps torchtitan's: every rank loads the same complete step, and differences are logged.

    Raises ValueError if torchtitan would continue with random weights, or part of a checkpoint.
    """
    if not _is_ours(manager):
        return bool(original(manager, step))
    optimizers: AdamMiniContainer = manager.states["optimizer"]
    with failing_together("load a checkpoint"):
        step = _step_to_load(manager, step)
        with failing_together("check the state that this run will save"):
            if manager.enable:
                check_savable({**manager.states["model"].state_dict(), **optimizers.state_dict()})
            configured = _hyper_parameters(optimizers)
        try:
            loaded = bool(original(manager, step))
        finally:
            optimizers.checkpoint_layout = {}
        if loaded:
            _apply_hyper_parameters(manager, configured)
    return loaded


def dcp_load_checked(
    original: Any, manager: Any, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
) -> None:
    """Wraps torchtitan's: reads only after the checkpoint was checked on every rank."""
    if _is_ours(manager) and not from_hf:
        with failing_together(f"check the checkpoint {checkpoint_id}"):
            stored = _prepare(manager, state_dict, checkpoint_id)
            state_dict = {
                key: _Prepared(part, part.state_dict()) if isinstance(part, Stateful) else part
                for key, part in state_dict.items()
            }
            check_checkpoint(stored, state_dict)
    original(manager, state_dict, checkpoint_id, from_hf, from_quantized)


def save_together(original: Any, manager: Any, curr_step: int, last_step: bool = False) -> None:
    """Wraps torchtitan's: a save that fails on one rank fails on all."""
    if not _is_ours(manager) or not manager._should_save(curr_step, last_step):
        original(manager, curr_step, last_step)
        return
    with failing_together(f"save step {curr_step}"):
        original(manager, curr_step, last_step)


def dcp_save_together(
    original: Any, manager: Any, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Wraps torchtitan's: writes only after every rank has collected its state."""
    if _is_ours(manager):
        with failing_together(f"collect the state for {checkpoint_id}"):
            state_dict = {
                key: part.state_dict() if isinstance(part, Stateful) else part for key, part in state_dict.items()
            }
    return original(manager, state_dict, checkpoint_id, *args, **kwargs)


def _is_ours(manager: Any) -> bool:
    return isinstance(manager.states["optimizer"], AdamMiniContainer)


def _step_to_load(manager: Any, step: int) -> int:
    """The step to load, as found by torchtitan, -1 if there is none. Raises ValueError if ranks differ."""
    with failing_together("look for checkpoints"):
        _refuse_random_start(manager, step)
        exists = manager.enable and os.path.exists(manager.folder)
        step = manager._find_load_step() if exists and step == -1 else step
    views = gathered((exists, step))
    for rank, other in enumerate(views):
        if other != views[0]:
            raise ValueError(
                f"{manager.folder} differs between ranks: rank 0 sees {_seen(*views[0])}, rank {rank} sees "
                f"{_seen(*other)}. Use a folder shared by all nodes, or start again once it is consistent"
            )
    return step


def _prepare(manager: Any, state_dict: dict[str, Any], checkpoint_id: str) -> Stored:
    """Prepare for the kind of optimizer state in a checkpoint.

    Raises ValueError if it is damaged, or if its metadata refer to code that torch's own reader would execute.
    """
    optimizers: AdamMiniContainer = manager.states["optimizer"]
    stored = Stored(checkpoint_id)
    stored.check_files()
    kind = stored.optimizer()
    if "optimizer" in state_dict:
        averaged = optimizers.load_adamw_state and kind == "AdamW"
        kinds = stored.kinds().items()
        optimizers.checkpoint_layout = {name: replace(stored_kind, elementwise=averaged) for name, stored_kind in kinds}
        if averaged:
            log_on_rank_0(
                logging.INFO, f"AdamMini: averaging AdamW's second moments from {checkpoint_id} over the blocks."
            )
    elif kind is not None:
        log_on_rank_0(
            logging.INFO,
            f"AdamMini: only the model is loaded from {checkpoint_id}, not its optimizer state "
            "(checkpoint.initial_load_model_only, exclude_from_loading, or step 0).",
        )
    _check_data_ranks(stored, state_dict)
    return stored


def _refuse_random_start(manager: Any, step: int) -> None:
    source = start_of(manager) if manager.enable else ""
    if not source:
        return
    if os.path.exists(manager.folder) and step == -1 and manager._find_load_step() == -1:
        raise ValueError(
            f"{manager.folder} exists but has no complete checkpoint (perhaps a run was stopped during its first "
            f"save): torchtitan would ignore {source} and start from random weights. Remove {manager.folder} to use "
            "that setting, or set another job.dump_folder."
        )


def _apply_hyper_parameters(manager: Any, configured: list[dict[str, Any]]) -> None:
    """Log hyper-parameters that differ between checkpoint and configuration, and apply the selected ones."""
    optimizers: AdamMiniContainer = manager.states["optimizer"]
    schedulers = manager.states["lr_scheduler"].schedulers
    use_config = optimizers.hyper_parameters == "config"
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    bases = [base for scheduler in schedulers for base in scheduler.base_lrs]
    differences = {}
    for group, mine, base in zip(groups, configured, bases, strict=True):
        # The scheduler has its own copy of the base rate, which is loaded even if the optimizer state is not.
        for key, there in {**{key: group.get(key) for key in mine}, "base_lr": base}.items():
            here = mine[_BASE if key == "base_lr" else key]
            if _plain(there) != _plain(here):
                name = "lr" if key in (_BASE, "base_lr") else key
                differences[name] = f"{name} {_plain(there)} and {_plain(here)}"
        if use_config:
            if there := group.get(_BASE):  # keep the schedule's current factor
                group["lr"] *= mine[_BASE] / float(there)
            group.update(mine)
    if use_config:
        for scheduler in schedulers:
            scheduler.base_lrs = [group[_BASE] for group in scheduler.optimizer.param_groups]
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    if differences:
        used = "the configuration's are used" if use_config else "the checkpoint's are used"
        hint = "" if use_config else ' (to use the configuration\'s: [optimizer.adam_mini] hyper_parameters = "config")'
        line = f"AdamMini: checkpoint and configuration differ: {'; '.join(differences.values())}; {used}{hint}."
        log_on_rank_0(logging.WARNING, line)


@dataclass
class _Prepared:
    """A Stateful with its state dict already computed, so that no local code can fail before torch communicates."""

    part: Stateful
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.part.load_state_dict(state_dict)


def start_of(checkpoint_config: Any) -> str:
    """The setting of ``[checkpoint]`` that selects the checkpoint to start from; "" if there is none.

    Raises ValueError if it has no effect.
    """
    source = checkpoint_config.initial_load_path
    if not (source or checkpoint_config.initial_load_in_hf):
        return ""
    setting = f"checkpoint.initial_load_path = {source}" if source else "checkpoint.initial_load_in_hf = true"
    if not checkpoint_config.enable:
        raise ValueError(
            f"{setting} has no effect without checkpoint.enable = true: the run would start from random weights. "
            "Set checkpoint.enable = true, or remove the other setting."
        )
    return setting


def _seen(exists: bool, step: int) -> str:
    return (
        "no such folder"
        if not exists
        else "no complete checkpoint"
        if step == -1
        else f"step {step} as the one to load"
    )


def _hyper_parameters(optimizers: OptimizersContainer) -> list[dict[str, Any]]:
    """Every group's configured values; the learning rate as the schedule's base rate."""
    hidden = ("params", "param_names", "lr")
    return [
        {key: value for key, value in group.items() if key not in hidden}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    """A value for comparison and display: tuples become lists, 0-d tensors numbers."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _check_data_ranks(stored: Stored, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the data loader positions are those of another number of data-parallel ranks."""
    loader = state_dict.get("dataloader")
    ranks = getattr(loader, "dp_world_size", None)
    if ranks is None or "dataloader.world_size" not in stored:
        return
    saved = stored.value("dataloader.world_size")
    if saved != ranks:
        raise ValueError(
            f"{stored.path} has data loader positions of {saved} data-parallel ranks, but this run has {ranks}: add "
            "--checkpoint.exclude_from_loading dataloader (the data then start from the beginning)"
        )
