"""torchtitan's checkpointer for AdamMini: fit is checked before anything is read, no run starts from random weights by
accident, AdamW's state and other types of momentum are converted as they are loaded, and what a restart changes is said
in one line. A run that is asked to end saves everything and leaves.

All but the last is for AdamMini: the rest of runs with other optimizers is torchtitan's own code, untouched.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer

from titan_adam_mini.checkpoint import check_checkpoint, check_savable
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.titan import interruption
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
            super().save(curr_step, last_step)
            return
        self._leaving = run.leaves(curr_step, last_step)
        begin = time.monotonic()
        if self._leaving:
            self._end_async_saves()
        whole = self._should_save(curr_step, last_step) and not (last_step and self.last_save_model_only)
        super().save(curr_step, last_step)

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

    def _load(self, step: int) -> bool:
        optimizers = self.states["optimizer"]
        if not isinstance(optimizers, AdamMiniContainer):
            return super().load(step)
        self._refuse_random_start(step)
        if self.enable:
            _agree(_words(check_savable, {**self.states["model"].state_dict(), **optimizers.state_dict()}))
        configured = _hyper_parameters(optimizers)
        try:
            loaded = super().load(step)
        finally:
            optimizers.holds = {}
        if loaded:
            self._settle(configured)
        return loaded

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As torchtitan's, once the checkpoint is known to fit on every rank."""
        optimizers = self.states["optimizer"]
        if isinstance(optimizers, AdamMiniContainer) and not from_hf:
            _agree(_words(self._check, optimizers, state_dict, checkpoint_id))
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _check(self, optimizers: AdamMiniContainer, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        """Raise ValueError if a checkpoint does not fit; prepare for the kind of optimizer state that it holds."""
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
        check_checkpoint(stored, state_dict)

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


def _words(check: Callable[..., None], *args: Any) -> str:
    """What a check has to say; nothing if all is well."""
    try:
        check(*args)
    except ValueError as error:
        return str(error)
    return ""


def _agree(wrong: str) -> None:
    """Raise ValueError on every rank if anything is wrong on one, so that none waits for the others for ever."""
    told: list[str] = [wrong]
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [""] * dist.get_world_size()
        dist.all_gather_object(told, wrong)
    words = wrong or next((f"(on another rank) {one}" for one in told if one), "")
    if words:
        raise ValueError(words)
