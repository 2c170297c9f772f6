"""From a torchtitan configuration to what a comparison of optimizers must know of it before anything is run."""

from dataclasses import dataclass
from typing import Any

from titan_adam_mini.memory.facts import ADAMW, facts
from titan_adam_mini.memory.stages import run_of
from titan_adam_mini.titan.build import configured
from titan_adam_mini.titan.builder import NAME
from titan_adam_mini.titan.refusals import data_ranks


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
    """Takes the whole process: see `child.py`.

    Args:
        arguments: torchtitan's command line, `--job.config_file X` among it.
        ngpu: number of ranks.

    Raises:
        ValueError: the run could not start, in words.
    """
    config = configured(arguments, ngpu)
    told = facts(run_of(config, ngpu, sequence=False))
    states, key = told["checkpoint"]["optimizer"], told["configured"] if config.optimizer.name == NAME else ADAMW
    degrees = config.parallelism
    stages = degrees.pipeline_parallel_degree
    last = degrees.pipeline_parallel_schedule != "ZBVZeroBubble"
    return Compared(
        config=config.to_dict(),
        model=told["model"],
        parameters=told["parameters"],
        state_bytes=states[key],
        shown=ngpu // stages * (stages - 1) if last else 0,
        data_ranks=data_ranks(degrees, ngpu),
    )
