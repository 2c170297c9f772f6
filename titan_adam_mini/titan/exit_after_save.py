"""The feature "signals": on a signal, all ranks save a full checkpoint after the same step, and exit.

For every optimizer. interruption.py handles signals and decides when all ranks exit; this file connects it to
torchtitan.
"""

import logging
import os
import time
from typing import Any

import torchtitan.distributed.utils as titan_distributed
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager

from titan_adam_mini.titan import interruption
from titan_adam_mini.titan.gloo import keep_exit_code
from titan_adam_mini.titan.log import log_on_rank_0
from titan_adam_mini.titan.replaced import replace


def install() -> None:
    """Make torchtitan handle signals from its start on, and its CheckpointManager save and exit."""
    replace(titan_distributed, "init_distributed", listen_first)
    replace(CheckpointManager, "__init__", init_with_interruption)
    replace(CheckpointManager, "load", load_or_exit)
    replace(CheckpointManager, "save", save_or_exit)
    replace(CheckpointManager, "_should_save", should_save_before_exit)


def listen_first(original: Any, comm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps torchtitan's, which a trainer calls first: from here on signals are handled and hangs detected.

    Raises ValueError for an environment variable that is no number of seconds.
    """
    # The other modes simulate many ranks in one process.
    if comm_config.mode == "default":
        interruption.start()
        keep_exit_code()
    return original(comm_config, *args, **kwargs)


def init_with_interruption(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps torchtitan's: in a run without checkpoints, the previous signal handlers are restored."""
    original(manager, *args, **kwargs)
    manager._interruption = interruption.current()
    manager._exit_after_save = False
    if manager._interruption is not None and (manager.load_only or not manager.enable):
        manager._interruption.restore_handlers()


def load_or_exit(original: Any, manager: Any, step: int = -1) -> bool:
    """Wraps torchtitan's, which the trainer calls once before the first step: exits if a signal has already arrived."""
    if (run := manager._interruption) is None:
        return bool(original(manager, step))
    own = manager.enable and os.path.exists(manager.folder)
    run.alive(0)
    loaded = bool(original(manager, step))
    trainer = manager.states["train_state"]
    if run.begin(trainer.step, trainer.step if loaded and own else None):
        run.exit(trainer)
    return loaded


def save_or_exit(original: Any, manager: Any, curr_step: int, last_step: bool = False) -> None:
    """Wraps torchtitan's, which the trainer calls after every step, whether a save is due or not.

    Raises SystemExit after the final save if a signal was received.
    """
    if (run := manager._interruption) is None:
        original(manager, curr_step, last_step)
        return
    manager._exit_after_save = run.should_exit(curr_step, last_step)
    begin = time.monotonic()
    if manager._exit_after_save:
        _end_async_saves(manager)
    complete = manager._should_save(curr_step, last_step) and not (last_step and manager.last_save_model_only)
    original(manager, curr_step, last_step)

    def saved(future: Any = None) -> None:
        if future is None or future.exception() is None:
            run.saved(curr_step, time.monotonic() - begin)

    if complete and not last_step and manager.async_mode != AsyncMode.DISABLED:
        manager.save_future.add_done_callback(saved)
    elif complete:
        saved()
    if manager._exit_after_save:
        run.exit(manager.states["train_state"], time.monotonic() - begin)
    run.passed(curr_step, last_step)


def should_save_before_exit(original: Any, manager: Any, curr_step: int, last_step: bool = False) -> bool:
    """Wraps torchtitan's: the step after which the run exits is always saved."""
    return manager._exit_after_save or bool(original(manager, curr_step, last_step))


def _end_async_saves(manager: Any) -> None:
    """Wait for a running async save, and make the next one synchronous, which needs no other process."""
    try:
        manager._async_wait()
    except (Exception, CheckpointException) as error:  # the signal may also have reached the process that writes it
        log_on_rank_0(logging.WARNING, f"The async save in progress failed; a newer full save follows: {error}")
    manager.save_future = None
    manager.async_mode = AsyncMode.DISABLED
