"""One TensorBoard curve over all starts of a run, for every optimizer: with TITAN_ADAM_MINI_ONE_CURVE=1.

torchtitan stamps TensorBoard's folder with the time of each start, so a run that is started again begins a second
curve. With the variable, all starts write into ``<dump_folder>/<save_tb_folder>`` and torchtitan's folders of replicas
and ranks below it, and a step that is done again replaces what an earlier start wrote for it and for later ones.
Without the variable nothing changes. Weights & Biases needs nothing from here: WANDB_RUN_ID and WANDB_RESUME do it.
"""

import re
from typing import Any

import torchtitan.components.metrics as titan_metrics
from torch.utils.tensorboard import SummaryWriter

from titan_adam_mini.titan.switch import switched_on

_VARIABLE = "TITAN_ADAM_MINI_ONE_CURVE"
_STAMP = re.compile(r"(.*)/\d{8}-\d{4}(?=/|$)")

_MARK = "titan_adam_mini_wraps"
_found = titan_metrics.TensorBoardLogger
original: Any = getattr(_found, _MARK, _found)


class TensorBoardLogger(original):
    """torchtitan's; on one curve, the writer is made at the first log, which says what step the run went on from.

    Raises:
        ValueError: the variable is neither 1 nor 0 nor empty.
    """

    def __init__(self, log_dir: str, tag: str | None = None) -> None:
        if not _wanted():
            super().__init__(log_dir, tag)
            return
        self.tag = tag
        self.writer: Any = None
        self._folder = _STAMP.sub(r"\1", log_dir)
        titan_metrics.logger.info(f"TensorBoard logging enabled. All starts of this run are in {self._folder}")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.writer is None:
            self.writer = SummaryWriter(self._folder, max_queue=1000, purge_step=step)
        super().log(metrics, step)
        if _wanted():
            # A killed process loses what it has not flushed, and steps before the last checkpoint are not done again.
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            super().close()


setattr(TensorBoardLogger, _MARK, original)


def _wanted() -> bool:
    return switched_on(_VARIABLE, "one curve over all starts")
