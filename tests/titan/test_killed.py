"""A run killed with SIGKILL anywhere, started again with the same command: the losses of a run nobody touched."""

import os
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import STEPS, Trainer
from moments import ITEM, METADATA, READ, RENAME, SAVE, SCHEDULE, Moment, when

pytestmark = pytest.mark.slow

EVERY = 3
SAVING = {"checkpoint.interval": EVERY, "checkpoint.last_save_model_only": False}


@dataclass(frozen=True)
class Death(Moment):
    """Where a rank dies.

    Attributes:
        resumes: the step of the checkpoint that the next start takes; 0 where none is whole.
        settings: more settings of the run.
    """

    resumes: int = EVERY
    settings: tuple[tuple[str, Any], ...] = ()


EXCHANGE = "titan_adam_mini.exchange"

DEATHS = {
    "in step 5, before the exchange": Death(1, (EXCHANGE, "Exchange", "start"), 5),
    "in step 8, parameters updated": Death(0, (EXCHANGE, "Exchange", "finish"), 8, resumes=6),
    "in step 5, before the schedule": Death(1, SCHEDULE, 6),
    "as the second save begins": Death(1, SAVE, 2),
    "in the data of the second save": Death(1, ITEM, 20, SAVE, 2),
    "in the data of the second save, the other rank": Death(0, ITEM, 60, SAVE, 2),
    "before the metadata of the second save": Death(0, METADATA, 2),
    "before the metadata of the second save have their name": Death(0, RENAME, 2),
    "as the second save is whole": Death(0, RENAME, 2, after=True, resumes=6),
    "in the data of an asynchronous save": Death(1, ITEM, 20, SAVE, 2, settings=(("checkpoint.async_mode", "async"),)),
    "as an old step is purged": Death(
        0, ("shutil", "", "rmtree"), resumes=9, settings=(("checkpoint.keep_latest_k", 2),)
    ),
    "in the data of the first save": Death(1, ITEM, 20, resumes=0),
    "before the metadata of the first save have their name": Death(0, RENAME, resumes=0),
}


IN_ALL = ("before the metadata of the second save have their name",)
"""A checkpoint that is almost whole; the other deaths are a sweep, before a release."""


def die(rank: int, planned: dict[str, Any]) -> None:
    """Make this process kill itself there, if it is the one."""
    death = Death(**planned)
    if rank == death.rank:
        when(death, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def steady(two: Any) -> Any:
    """The run that nobody touches, and that saves at other steps."""
    return two


def killed(trainer: Trainer, name: str, death: Death, steady: Any) -> None:
    """A start that dies; every loss that it said is the steady run's."""
    from titan_adam_mini.tools.trainer import Run, RunFailed

    with pytest.raises(RunFailed, match="SIGKILL"):
        trainer(name, ranks=2, data=2, hook=die, given=(asdict(death),), **SAVING, **dict(death.settings))
    run = Run.load(trainer.out / f"{name}.log", 2)
    assert all(loss == steady.losses[step] for step, loss in run.losses.items())


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=pytest.mark.nightly if name not in IN_ALL else ()) for name in DEATHS]
)
def test_started_again_the_losses_are_those_of_a_run_that_nobody_touched(
    trainer: Trainer, steady: Any, where: str
) -> None:
    from titan_adam_mini.tools.trainer import RunFailed

    death = DEATHS[where]
    name = f"killed_{list(DEATHS).index(where)}"
    folder = trainer.out / name / "checkpoint"
    killed(trainer, name, death, steady)
    assert folder.is_dir()
    if death.resumes == 0:
        with pytest.raises(RunFailed, match="has no complete checkpoint"):
            trainer(name, ranks=2, data=2, **SAVING)
        shutil.rmtree(folder)
    again = trainer(name, ranks=2, data=2, **SAVING, **dict(death.settings))
    assert again.losses == {step: steady.losses[step] for step in range(death.resumes + 1, STEPS + 1)}
    assert (Path(folder) / f"step-{STEPS}" / ".metadata").is_file()


@pytest.mark.nightly
def test_killed_while_it_loads(trainer: Trainer, steady: Any) -> None:
    killed(trainer, "killed_loading", DEATHS["in step 5, before the exchange"], steady)
    killed(trainer, "killed_loading", Death(1, READ, 2), steady)
    again = trainer("killed_loading", ranks=2, data=2, **SAVING)
    assert again.losses == {step: steady.losses[step] for step in range(EVERY + 1, STEPS + 1)}
