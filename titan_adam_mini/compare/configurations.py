"""From a torchtitan configuration to what a comparison of optimizers must know of it before anything is run."""

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
        parameters: of the whole model.
        state_bytes: of the optimizer's state, every element counted once.
        shown: the rank that knows the loss.
        data_ranks: how many ranks read data of their own.
    """

    config: dict[str, Any]
    model: str
    parameters: int
    state_bytes: int
    shown: int
    data_ranks: int


def read_compared(arguments: list[str], ngpu: int) -> Compared:
    """What a variant is, if its run could start. Takes the whole process: see `tools/isolated_process.py`.

    Args:
        arguments: torchtitan's command line, `--job.config_file X` among it.
        ngpu: number of ranks.

    Raises:
        ValueError: the run could not start, in words.
    """
    config = configured(arguments, ngpu)
    run = run_of(config, ngpu)
    optimizers, mini = optimizers_of(run)
    check(run, optimizers[mini])
    degrees = config.parallelism
    stages = degrees.pipeline_parallel_degree
    last = degrees.pipeline_parallel_schedule != "ZBVZeroBubble"
    return Compared(
        config=config.to_dict(),
        model=run.model,
        parameters=run.parameters,
        state_bytes=run.checkpoint_bytes(optimizers[mini if config.optimizer.name == NAME else ADAMW]),
        shown=ngpu // stages * (stages - 1) if last else 0,
        data_ranks=data_ranks(degrees, ngpu),
    )
