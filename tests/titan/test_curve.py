"""One curve over two starts of a run: each step once, with the values of the start that did it last."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torchtitan.components.metrics as titan_metrics
from forked import STEPS, Trainer

from titan_adam_mini.titan import curve, register

END, SAVED = 5, 3
"""The first start ends after step 5; the second goes on from step 3."""


def fake_wandb(rank: int, file: str) -> None:
    """A `wandb` for this rank that writes down what arrives, and what its own environment variables say."""

    def write(*told: Any) -> None:
        with open(f"{file}{rank}", "a") as log:
            log.write(json.dumps(told) + "\n")

    def init(**settings: Any) -> None:
        asked = [settings["id"], settings.get("resume", os.environ.get("WANDB_RESUME"))]
        write("init", *asked, settings["resume_from"], settings["fork_from"])

    module: Any = SimpleNamespace(init=init, log=lambda metrics, step: write("log", step), run=None)
    sys.modules["wandb"] = module


def twice(trainer: Trainer, name: str, ranks: int, **more: Any) -> None:
    """A run that ends early, its last checkpoint lost, and a second start of it."""
    settings = {"checkpoint.interval": SAVED, "metrics.enable_tensorboard": True, **more}
    hook = {"hook": fake_wandb, "given": (str(trainer.out / f"{name}.wandb"),)}
    trainer(name, ranks=ranks, data=ranks, **{"training.steps": END}, **settings, **hook)
    shutil.rmtree(trainer.checkpoint(name, END))
    trainer(name, ranks=ranks, data=ranks, start={}, **settings, **hook)


def events(folder: Path) -> dict[str, list[Any]]:
    """name -> events with step and value, from TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: reader.Scalars(name) for name in reader.Tags()["scalars"]}


@pytest.mark.slow
def test_each_step_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AdamW; AdamMini's curve after a pre-emption: tests/slurm/test_training.py."""
    for name, value in {curve._VARIABLE: "1", "WANDB_RUN_ID": "a-run", "WANDB_RESUME": "allow"}.items():
        monkeypatch.setenv(name, value)
    ranks = 2
    both = {"metrics.save_for_all_ranks": True, "metrics.enable_wandb": True}
    twice(trainer, "curve", ranks, **{"optimizer.name": "AdamW"}, **both)
    board = trainer.out / "curve" / "tb"
    folders = [board / f"rank_{rank}" for rank in range(ranks)]
    assert {file.parent for file in board.rglob("events.*")} == set(folders)
    for folder in folders:
        assert len(list(folder.glob("events.*"))) == 2
        found = events(folder)
        assert {"lr", "loss_metrics/global_avg_loss", "throughput(tps)"} <= set(found)
        for name, curve_of in found.items():
            assert [one.step for one in curve_of] == list(range(1, STEPS + 1)), name
        # The names of TensorBoard's files have the second in which they were made.
        begun = int(max(folder.glob("events.*")).name.split(".")[3])
        assert [one.wall_time >= begun for one in found["lr"]] == [step > SAVED for step in range(1, STEPS + 1)]

    for rank in range(ranks):
        told = [json.loads(line) for line in (trainer.out / f"curve.wandb{rank}").read_text().splitlines()]
        assert [one for one in told if one[0] == "init"] == [["init", "a-run", "allow", None, None]] * 2
        # It is Weights & Biases that ignores steps 4 and 5 the second time.
        steps = [*range(1, END + 1), *range(SAVED + 1, STEPS + 1)]
        assert [one[1] for one in told if one[0] == "log"] == steps


def test_the_writer_waits_for_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(curve._VARIABLE, "1")
    board = tmp_path / "20240101-1200" / "tb"
    for below in ("", "/replica_0/rank_1"):
        one = titan_metrics.TensorBoardLogger(f"{board}/20260102-0304{below}", "tagged")
        one.close()
        assert not Path(f"{board}{below}").exists(), "a start that logs nothing leaves nothing"
        one = titan_metrics.TensorBoardLogger(f"{board}/20260102-0304{below}", "tagged")
        one.log({"loss": 2.0}, 7)
        one.log({"loss": 1.0}, 8)
        found = events(Path(f"{board}{below}"))["tagged/loss"]  # a process that is killed here loses nothing
        one.close()
        assert [(event.step, event.value) for event in found] == [(7, 2.0), (8, 1.0)]
        shutil.rmtree(board)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_it_is_torchtitans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    monkeypatch.delenv(curve._VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(curve._VARIABLE, value)
    folder = tmp_path / "tb" / "20260102-0304"
    one = titan_metrics.TensorBoardLogger(str(folder))
    assert [file.parent for file in tmp_path.rglob("events.*")] == [folder]
    one.log({"loss": 2.0}, 7)
    one.close()
    assert [event.step for event in events(folder)["loss"]] == [7]


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(curve._VARIABLE, "yes")
    with pytest.raises(ValueError, match=re.escape("TITAN_ADAM_MINI_ONE_CURVE = 'yes' is not valid: it is 1")):
        titan_metrics.TensorBoardLogger(str(tmp_path))


def test_a_reload_does_not_wrap_the_wrapper() -> None:
    original = curve.original
    before = curve.TensorBoardLogger
    assert titan_metrics.TensorBoardLogger is before
    again = importlib.reload(curve)
    assert again.original is original
    assert again.TensorBoardLogger is not before
    assert again.TensorBoardLogger.__mro__[1] is original
    register._replace_everywhere((before,), again.TensorBoardLogger)
    assert titan_metrics.TensorBoardLogger is again.TensorBoardLogger
    register.enable()
    assert titan_metrics.TensorBoardLogger is again.TensorBoardLogger
