"""A run that is asked to end saves everything at one step and leaves; started again, the losses are as if nothing was."""

import json
import os
import re
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from forked import STEPS, Trainer
from moments import ITEM, METADATA, READ, SAVE, SCHEDULE, Moment, when

from titan_adam_mini.titan.interruption import LEFT, STUCK

EVERY = 5
SAVING = {"checkpoint.interval": EVERY}
"""The last step holds the model alone, torchtitan's default."""


def send(rank: int, *planned: tuple[int, dict[str, Any]]) -> None:
    """Make this process send itself signals: (number, moment)."""
    for number, moment in planned:
        if rank == moment["rank"]:
            when(Moment(**moment), lambda number=number: os.kill(os.getpid(), number))


def left(trainer: Trainer, name: str, *signals: tuple[int, Moment], ranks: int = 2, **settings: Any) -> Any:
    """The run `name`, whose ranks hear signals; all of them left with the exit code of such a run."""
    from runs import Run, RunFailed

    planned = tuple((number, asdict(moment)) for number, moment in signals)
    with pytest.raises(RunFailed, match=re.escape(f"ended with {[LEFT] * ranks} ")):
        trainer(name, ranks=ranks, hook=send, given=planned, patience=60, **settings)
    run = Run(ranks, trainer.out / f"{name}.log")
    for line in run.log.read_text().splitlines():
        run.read(line)
    return run


@pytest.fixture(scope="module")
def steady(trainer: Trainer) -> Any:
    """The run that nobody asks to end."""
    return trainer("steady2", ranks=2, data=2, **SAVING)


@pytest.mark.slow
def test_a(trainer: Trainer, steady: Any) -> None:
    twice = [(signal.SIGUSR1, Moment(1, SCHEDULE, 4))]
    run = left(trainer, "asked", *twice, data=2, **SAVING)
    print("\n".join(run.lines[-30:]))
