"""A run that is asked to end saves everything at one step and leaves; started again, its losses are those of a run that
nobody asked. And what a run says of itself meanwhile."""

import json
import os
import re
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from forked import SEQ_LEN, STEPS, Trainer, difference
from moments import ITEM, METADATA, READ, SAVE, SCHEDULE, Moment, when

from titan_adam_mini.titan.interruption import SAVED, STUCK

pytestmark = pytest.mark.slow

EVERY = 4
SAVING = {"checkpoint.interval": EVERY}
"""The last step holds the model alone, which is torchtitan's default."""
BUILD = ("torchtitan.components.checkpoint", "CheckpointManager", "__init__")
VALIDATE = ("torchtitan.components.validate", "Validator", "validate")
CLOSE = ("torchtitan.components.metrics", "MetricsProcessor", "close")
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def act(rank: int, *planned: tuple[str, int, dict[str, Any]]) -> None:
    """What this rank is to do, and when: (name of a function here, its argument, moment)."""
    for name, argument, moment in planned:
        if rank == moment["rank"]:
            when(Moment(**moment), lambda name=name, argument=argument: globals()[name](argument))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def fail(number: int) -> None:
    raise OSError(number, "no room here")


def hang(number: int) -> None:
    threading.Event().wait()


def do(acts: Sequence[tuple[str, int, Moment]]) -> dict[str, Any]:
    return {"hook": act, "given": tuple((name, argument, asdict(moment)) for name, argument, moment in acts)}


def ended(code: int, trainer: Trainer, name: str, *acts: tuple[str, int, Moment], ranks: int = 2, **more: Any) -> Any:
    """The run `name`, of which every rank ended by itself, with this exit code."""
    from titan_adam_mini.tools.trainer import Run, RunFailed

    with pytest.raises(RunFailed, match=re.escape(f"{name} ended with {[code] * ranks} ")):
        trainer(name, ranks=ranks, patience=60, **do(acts), **more)
    return Run.load(trainer.out / f"{name}.log", ranks)


def left(trainer: Trainer, name: str, *acts: tuple[str, int, Moment], **more: Any) -> tuple[Any, int]:
    """A run that left, as :func:`ended`, and after which step."""
    run = ended(SAVED, trainer, name, *acts, **more)
    step = max(run.losses)
    assert whole(trainer, name, step)
    return run, step


def whole(trainer: Trainer, name: str, step: int) -> bool:
    """Whether a checkpoint has all that a run needs to go on."""
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(trainer.checkpoint(name, step)).read_metadata().state_dict_metadata
    sections = {key.partition(".")[0] for key in keys}
    return sections >= {"optimizer", "lr_scheduler", "dataloader", "train_state"}


def said(run: Any) -> list[str]:
    """The line of a run that leaves."""
    return [line for line in run.lines if f"Exit code {SAVED}" in line]


@pytest.fixture(scope="module")
def steady(two: Any) -> dict[int, float]:
    """The losses of a run that nobody asks to end, and that saves at other steps."""
    losses: dict[int, float] = two.losses
    return losses


@pytest.fixture
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads the progress file that the runs write."""
    file = tmp_path / "progress.json"
    monkeypatch.setenv("TITAN_ADAM_MINI_PROGRESS", str(file))

    def read() -> tuple[int, int, int | None]:
        told = json.loads(file.read_text())
        assert told["time"] > 1.7e9 and list(tmp_path.iterdir()) == [file]
        return told["first"], told["step"], told["saved"]

    return read


def test_asked_before_the_first_step_and_in_the_middle(
    trainer: Trainer, steady: dict[int, float], progress: Any
) -> None:
    start = {"data": 2, **SAVING}
    folder = trainer.out / "asked" / "checkpoint"

    run = ended(SAVED, trainer, "asked", ("send", USR1, Moment(1, BUILD, after=True)), **start)
    assert re.search(r"SIGUSR1: .* the next start resumes from the beginning\.", said(run)[0])
    assert run.losses == {} and not folder.exists() and progress() == (0, 0, None)

    # Twice in a row on one rank, and again while it saves and while it closes.
    again = [("send", USR1, Moment(1, SCHEDULE, 4)), ("send", USR1, Moment(1, SCHEDULE, 4, after=True))]
    late = [("send", TERM, Moment(0, METADATA)), ("send", USR1, Moment(1, CLOSE)), ("send", TERM, Moment(1, CLOSE))]
    run, step = left(trainer, "asked", *again, *late, **start)
    assert step in (3, 4) and [path.name for path in folder.iterdir()] == [f"step-{step}"]
    assert f"SIGUSR1: exiting after step {step}, with a full checkpoint (" in said(run)[0]
    assert progress() == (0, step, step)
    losses = run.losses

    run = ended(SAVED, trainer, "asked", ("send", TERM, Moment(0, READ)), **start)
    assert re.search(rf"SIGTERM: .* the next start resumes from the checkpoint of step {step}\.", said(run)[0])
    assert run.losses == {} and progress() == (step, step, step)

    run = trainer("asked", ranks=2, **start)
    assert losses | run.losses == steady and len(losses) + len(run.losses) == STEPS
    assert not whole(trainer, "asked", STEPS) and progress() == (step, STEPS, 8)


def test_asked_while_it_saves_or_validates_and_in_the_last_step(
    trainer: Trainer, steady: dict[int, float], progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"data": 2, **SAVING}

    validating = {f"validation.{key}": value for key, value in (("enable", True), ("freq", STEPS), ("steps", 1))}
    validating |= {"validation.dataset_path": trainer.corpus / "validation", "validation.seq_len": SEQ_LEN}
    run, step = left(trainer, "busy", ("send", USR1, Moment(1, VALIDATE)), **start, **validating)
    assert step in (2, 3) and list(run.validation) == [1]
    losses = run.losses

    monkeypatch.setenv("TITAN_ADAM_MINI_LEAD_SECONDS", "0.01")
    saving = ("send", TERM, Moment(1, ITEM, 20, SAVE, 1))
    run, second = left(trainer, "busy", saving, **start)
    assert second in (5, 6) and progress() == (step, second, second)
    warned = [line for line in run.lines if "TITAN_ADAM_MINI_LEAD_SECONDS" in line]
    assert re.search(
        r"Saving step 4 took [\d.]+ seconds, more than half of the 0.01 seconds between a signal and the end ",
        warned[0],
    )
    losses |= run.losses

    run, third = left(trainer, "busy", saving, **start, **{"checkpoint.async_mode": "async"})
    assert 8 < third < STEPS and whole(trainer, "busy", 8) and progress() == (second, third, third)
    warned = [line for line in run.lines if "TITAN_ADAM_MINI_LEAD_SECONDS" in line]
    assert "Saving step 8 took" in warned[0]
    losses |= run.losses

    late = [("send", TERM, Moment(rank, SCHEDULE, 1 + STEPS - third)) for rank in range(2)]
    run = trainer("busy", ranks=2, **do(late), **start)
    assert not said(run) and max(run.losses) == STEPS and progress() == (third, STEPS, third)
    assert losses | run.losses == steady


def test_a_save_under_way_that_fails_does_not_keep_the_run_from_saving(trainer: Trainer) -> None:
    acts = [("fail", 28, Moment(0, METADATA)), ("send", TERM, Moment(1, ITEM, 20, SAVE, 1))]
    run, step = left(trainer, "full", *acts, data=2, **SAVING, **{"checkpoint.async_mode": "async"})
    assert step > EVERY and not (trainer.checkpoint("full", EVERY) / ".metadata").exists()
    assert "no room here" in "\n".join(run.lines).partition("The async save in progress failed")[2]


@pytest.mark.nightly
def test_pipeline_stages(trainer: Trainer, one: Any) -> None:
    """torchtitan does not normalise gradients under a pipeline, and clipping makes that another run: it learns."""
    stages = {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_schedule": "1F1B", "shown": 1}
    unasked = trainer("unasked_stages", ranks=2, **stages, **SAVING)
    assert abs(unasked.losses[1] - one.losses[1]) < 1e-3
    assert unasked.losses[STEPS] < 0.85 * unasked.losses[1]
    run, step = left(trainer, "asked_stages", ("send", TERM, Moment(1, SCHEDULE, 4)), **stages, **SAVING)
    assert step in (3, 4)
    assert run.losses | trainer("asked_stages", ranks=2, **stages, **SAVING).losses == unasked.losses


def test_adamw_on_one_rank(trainer: Trainer, adamw: Any) -> None:
    settings = {"optimizer.name": "AdamW", "ranks": 1, **SAVING}
    run, step = left(trainer, "asked_adamw", ("send", USR1, Moment(0, SCHEDULE, 4)), **settings)
    assert step == 3
    again = trainer("asked_adamw", **settings)
    assert difference(again, adamw, first=step + 1) < 1e-3 and list(run.losses) == [1, 2, 3]


def test_without_checkpoints_a_signal_ends_the_run_as_ever(trainer: Trainer, progress: Any) -> None:
    from titan_adam_mini.tools.trainer import RunFailed

    off = {"checkpoint.enable": False, "start": {}}
    with pytest.raises(RunFailed, match=r"ended with \['SIGUSR1'\]"):
        trainer("off", ranks=1, **do([("send", USR1, Moment(0, SCHEDULE, 5))]), **off)
    assert "SIGTERM and SIGUSR1 end it as usual" in (trainer.out / "off.log").read_text()
    assert progress() == (0, 1, None)


def test_a_run_that_hangs_ends_and_says_where(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_ADAM_MINI_HANG_SECONDS", "20")
    ended(STUCK, trainer, "stuck", ("hang", 0, Moment(1, SCHEDULE, 4)), data=2, **SAVING)
    for rank, log, where in ((0, "stuck.log", "train_step"), (1, "stuck.rank1.log", "in hang")):
        text = (trainer.out / log).read_text()
        assert re.search(
            rf"rank {rank}: no step boundary was passed for 20 seconds .* the last one was step [23]. ", text
        )
        assert where in text.partition("Stacks of all threads:")[2]
        assert (trainer.out / "stuck" / "comm_traces" / f"rank_{rank}").stat().st_size > 0
