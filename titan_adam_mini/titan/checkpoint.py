"""torchtitan's checkpointer for AdamMini: fit is checked before anything is read, no run starts from random weights by
accident, AdamW's state and other types of momentum are converted as they are loaded, and what a restart changes is said
in one line. A run that is asked to end saves everything and leaves.

All but the last is for AdamMini: the rest of runs with other optimizers is torchtitan's own code, untouched.
"""

import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer

from titan_adam_mini.checkpoint import check_checkpoint, check_savable
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.titan import interruption
from titan_adam_mini.titan.all_ranks import failing_together, gathered
from titan_adam_mini.titan.builder import AdamMiniContainer
from titan_adam_mini.titan.log import say

_BASE = "initial_lr"
"""The learning rate of the configuration, which the schedule multiplies."""


class AdamMiniCheckpointManager(CheckpointManager):
    """torchtitan's CheckpointManager, with three more looks at what it is about to do, and an end before the last step.

    The trainer calls `load` once before the first step, and `save` after every step, whether one is due or not.
    """

    _leaving = False

    def __init__(self, *args: Any, checkpoint_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, checkpoint_config=checkpoint_config, **kwargs)
        self._config = checkpoint_config
        self._interruption = interruption.current()
        if self._interruption is not None and (self.load_only or not self.enable):
            self._interruption.give_up()

    def load(self, step: int = -1) -> bool:
        """As torchtitan's. Raises ValueError where it would go on with random weights, or half of a checkpoint."""
        if (run := self._interruption) is None:
            return self._load(step)
        own = self.enable and os.path.exists(self.folder)
        run.alive(0)
        loaded = self._load(step)
        trainer = self.states["train_state"]
        if run.begin(trainer.step, trainer.step if loaded and own else None):
            run.leave(trainer)
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """As torchtitan's. Raises SystemExit once a run that was asked to end has saved everything."""
        if (run := self._interruption) is None:
            self._save(curr_step, last_step)
            return
        self._leaving = run.leaves(curr_step, last_step)
        begin = time.monotonic()
        if self._leaving:
            self._end_async_saves()
        whole = self._should_save(curr_step, last_step) and not (last_step and self.last_save_model_only)
        self._save(curr_step, last_step)

        def saved(future: Any = None) -> None:
            if future is None or future.exception() is None:
                run.saved(curr_step, time.monotonic() - begin)

        if whole and not last_step and self.async_mode != AsyncMode.DISABLED:
            self.save_future.add_done_callback(saved)
        elif whole:
            saved()
        if self._leaving:
            run.leave(self.states["train_state"], time.monotonic() - begin)
        run.passed(curr_step, last_step)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self._leaving or super()._should_save(curr_step, last_step)

    def _end_async_saves(self) -> None:
        """Wait for a save that is under way, and let the next one be synchronous, which needs no other process."""
        try:
            self._async_wait()
        except (Exception, CheckpointException) as error:  # the signal may have reached the process that wrote it, too
            say(logging.WARNING, f"The save under way failed, and the one that follows holds more: {error}")
        self.save_future: Any = None
        self.async_mode = AsyncMode.DISABLED

    def _save(self, curr_step: int, last_step: bool) -> None:
        if not self._is_ours or not self._should_save(curr_step, last_step):
            super().save(curr_step, last_step)
            return
        with failing_together(f"save step {curr_step}"):
            super().save(curr_step, last_step)

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """As torchtitan's, once every rank has what it is to save."""
        if self._is_ours:
            with failing_together(f"collect what goes into {checkpoint_id}"):
                state_dict = {
                    key: part.state_dict() if isinstance(part, Stateful) else part for key, part in state_dict.items()
                }
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _load(self, step: int) -> bool:
        if not self._is_ours:
            return super().load(step)
        optimizers: AdamMiniContainer = self.states["optimizer"]
        with failing_together("load a checkpoint"):
            step = self._start(step)
            with failing_together("check what this run will save"):
                if self.enable:
                    check_savable({**self.states["model"].state_dict(), **optimizers.state_dict()})
                configured = _hyper_parameters(optimizers)
            try:
                loaded = super().load(step)
            finally:
                optimizers.holds = {}
            if loaded:
                self._settle(configured)
        return loaded

    def _start(self, step: int) -> int:
        """The step to load, as torchtitan would find it, -1 if there is none; the same on all ranks or ValueError."""
        with failing_together("look for checkpoints"):
            self._refuse_random_start(step)
            exists = self.enable and os.path.exists(self.folder)
            step = self._find_load_step() if exists and step == -1 else step
        seen = gathered((exists, step))
        for rank, other in enumerate(seen):
            if other != seen[0]:
                raise ValueError(
                    f"{self.folder} is not the same on all ranks: rank 0 sees {_seen(*seen[0])}, rank {rank} "
                    f"{_seen(*other)}. Use a folder that all nodes share, or start again once it shows them the same"
                )
        return step

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As torchtitan's, once the checkpoint is known to fit on every rank."""
        if self._is_ours and not from_hf:
            with failing_together(f"check the checkpoint {checkpoint_id}"):
                stored = self._prepare(state_dict, checkpoint_id)
                state_dict = {
                    key: _Prepared(part, part.state_dict()) if isinstance(part, Stateful) else part
                    for key, part in state_dict.items()
                }
                check_checkpoint(stored, state_dict)
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    @property
    def _is_ours(self) -> bool:
        return isinstance(self.states["optimizer"], AdamMiniContainer)

    def _prepare(self, state_dict: dict[str, Any], checkpoint_id: str) -> Stored:
        """Prepare for the kind of optimizer state that a checkpoint has.

        Raises ValueError if it is damaged, or asks for what torch's own reader, which comes next, would execute.
        """
        optimizers: AdamMiniContainer = self.states["optimizer"]
        stored = Stored(checkpoint_id)
        stored.check_files()
        kind = stored.optimizer()
        if "optimizer" in state_dict:
            averaged = optimizers.load_adamw_state and kind == "AdamW"
            kinds = stored.kinds().items()
            optimizers.holds = {name: replace(one, elementwise=averaged) for name, one in kinds}
            if averaged:
                say(logging.INFO, f"AdamMini: averaging AdamW's second moments of {checkpoint_id} over the blocks.")
        elif kind is not None:
            say(
                logging.INFO,
                f"AdamMini: only the model of {checkpoint_id} is loaded, not its optimizer state "
                "(checkpoint.initial_load_model_only, exclude_from_loading, or step 0).",
            )
        _check_data_ranks(stored, state_dict)
        return stored

    def _refuse_random_start(self, step: int) -> None:
        told = start_of(self._config)
        if not told:
            return
        if os.path.exists(self.folder) and step == -1 and self._find_load_step() == -1:
            raise ValueError(
                f"{self.folder} exists but holds no whole checkpoint (a run stopped during its first save, perhaps): "
                f"torchtitan would ignore {told} and start from random weights. Remove {self.folder} to start from "
                "there again, or name another job.dump_folder."
            )

    def _settle(self, configured: list[dict[str, Any]]) -> None:
        """Say which hyper-parameters differ between checkpoint and configuration; let the one asked for count."""
        optimizers: AdamMiniContainer = self.states["optimizer"]
        schedulers = self.states["lr_scheduler"].schedulers
        keep = optimizers.hyper_parameters == "config"
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        bases = [base for scheduler in schedulers for base in scheduler.base_lrs]
        told = {}
        for group, mine, base in zip(groups, configured, bases, strict=True):
            # The schedule has its own copy of the base, which is loaded even where the optimizer's state is not.
            for key, there in {**{key: group.get(key) for key in mine}, "base_lr": base}.items():
                here = mine[_BASE if key == "base_lr" else key]
                if _plain(there) != _plain(here):
                    name = "lr" if key in (_BASE, "base_lr") else key
                    told[name] = f"{name} {_plain(there)} there, {_plain(here)} here"
            if keep:
                if there := group.get(_BASE):  # where the schedule stands is kept
                    group["lr"] *= mine[_BASE] / float(there)
                group.update(mine)
        if keep:
            for scheduler in schedulers:
                scheduler.base_lrs = [group[_BASE] for group in scheduler.optimizer.param_groups]
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        if told:
            counts = "the configuration counts" if keep else "the checkpoint counts"
            cure = (
                "" if keep else ' (to let the configuration count: [optimizer.adam_mini] hyper_parameters = "config")'
            )
            line = f"AdamMini: checkpoint and configuration differ: {'; '.join(told.values())}: {counts}{cure}."
            say(logging.WARNING, line)


@dataclass
class _Prepared:
    """A Stateful whose state dict has been made already: nothing local is left to fail before torch communicates."""

    part: Stateful
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.part.load_state_dict(state_dict)


def start_of(checkpoint_config: Any) -> str:
    """The setting of ``[checkpoint]`` that names where a run starts from; "" if none does.

    Raises ValueError if it has no effect.
    """
    source = checkpoint_config.initial_load_path
    if not (source or checkpoint_config.initial_load_in_hf):
        return ""
    told = f"checkpoint.initial_load_path = {source}" if source else "checkpoint.initial_load_in_hf = true"
    if not checkpoint_config.enable:
        raise ValueError(
            f"{told} has no effect without checkpoint.enable = true: the run would start from random weights. "
            "Set checkpoint.enable = true, or leave the other out."
        )
    return told


def _seen(exists: bool, step: int) -> str:
    return (
        "no such folder" if not exists else "no whole checkpoint" if step == -1 else f"step {step} as the one to load"
    )


def _hyper_parameters(optimizers: OptimizersContainer) -> list[dict[str, Any]]:
    """Every group's keys as configured; the learning rate as the schedule's base."""
    hidden = ("params", "param_names", "lr")
    return [
        {key: value for key, value in group.items() if key not in hidden}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    """A value that can be compared and shown: tuples and lists are the same, 0-d tensors are numbers."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _check_data_ranks(stored: Stored, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the positions in the data are those of another number of data-parallel ranks."""
    loader = state_dict.get("dataloader")
    ranks = getattr(loader, "dp_world_size", None)
    if ranks is None or "dataloader.world_size" not in stored:
        return
    saved = stored.value("dataloader.world_size")
    if saved != ranks:
        raise ValueError(
            f"{stored.path} has the data positions of {saved} data-parallel ranks, and this run has {ranks}: add "
            "--checkpoint.exclude_from_loading dataloader (the data then start anew)"
        )
