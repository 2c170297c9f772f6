"""The torchtitan configuration of a variant, checked and summarized before anything is run."""

from dataclasses import dataclass
from typing import Any

from ..offline.build import configured
from ..offline.checks import check
from ..offline.rank_memory import ADAMW, optimizers_of
from ..offline.refusals import data_ranks
from ..offline.stages import run_of
from ..titan.builder import NAME


@dataclass(frozen=True)
class Compared:
    """One variant's configuration.

    Attributes:
        config: torchtitan's job configuration as a dictionary.
        model: its name and flavor.
        parameters: of the full model.
        state_bytes: of the optimizer's state, every element counted once.
        loss_rank: the rank that reports the loss.
        data_ranks: number of ranks that read different data.
    """

    config: dict[str, Any]
    model: str
    parameters: int
    state_bytes: int
    loss_rank: int
    data_ranks: int


def read_compared(arguments: list[str], ngpu: int) -> Compared:
    """A variant's configuration. Needs a process of its own: see `tools/isolated_process.py`.

    Args:
        arguments: torchtitan's command line, with `--job.config_file X`.
        ngpu: number of ranks.

    Raises:
        ValueError: the run could not start.
    """
    config = configured(arguments, ngpu)
    run = run_of(config, ngpu)
    optimizers, mini = optimizers_of(run)
    check(run, optimizers[mini])
    degrees = config.parallelism
    stages = degrees.pipeline_parallel_degree
    loss_on_last_stage = degrees.pipeline_parallel_schedule != "ZBVZeroBubble"
    return Compared(
        config=config.to_dict(),
        model=run.model,
        parameters=run.parameters,
        state_bytes=run.checkpoint_bytes(optimizers[mini if config.optimizer.name == NAME else ADAMW]),
        loss_rank=ngpu // stages * (stages - 1) if loss_on_last_stage else 0,
        data_ranks=data_ranks(degrees, ngpu),
    )
