"""The feature "one_curve": one TensorBoard curve over all starts of a run, for every optimizer.

torchtitan stamps TensorBoard's folder with the time of each start, so a run that is started again begins a second
curve. With this feature, all starts write to ``<dump_folder>/<save_tb_folder>`` and torchtitan's folders of replicas
and ranks below it, and a repeated step replaces what an earlier start wrote for it and for later steps. Weights &
Biases does not need this: WANDB_RUN_ID and WANDB_RESUME have the same effect.
"""

import re
from typing import Any

import torchtitan.components.metrics as titan_metrics
from torch.utils.tensorboard import SummaryWriter

from titan_adam_mini.titan.replaced import replace

_STAMP = re.compile(r"(.*)/\d{8}-\d{4}(?=/|$)")


def install() -> None:
    """Make torchtitan's TensorBoardLogger continue an existing curve."""
    replace(titan_metrics.TensorBoardLogger, "__init__", init_without_time)
    replace(titan_metrics.TensorBoardLogger, "log", log_from_first_step)
    replace(titan_metrics.TensorBoardLogger, "close", close_if_open)


def init_without_time(original: Any, logger: Any, log_dir: str, tag: str | None = None) -> None:
    """Replaces torchtitan's: the folder has no time stamp, and the writer is created by the first `log`."""
    logger.tag = tag
    logger.writer = None
    logger._folder = _STAMP.sub(r"\1", log_dir)
    titan_metrics.logger.info(f"TensorBoard logging enabled. All starts of this run are in {logger._folder}")


def log_from_first_step(original: Any, logger: Any, metrics: dict[str, Any], step: int) -> None:
    """Wraps torchtitan's: from the first logged step on, values of earlier starts are replaced."""
    if logger.writer is None:
        logger.writer = SummaryWriter(logger._folder, max_queue=1000, purge_step=step)
    original(logger, metrics, step)
    # A killed process loses unflushed values, and steps before the last checkpoint are not repeated.
    logger.writer.flush()


def close_if_open(original: Any, logger: Any) -> None:
    """Wraps torchtitan's: without logged values there is no writer."""
    if logger.writer is not None:
        original(logger)
