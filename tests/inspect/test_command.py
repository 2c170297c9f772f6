"""The command's flags, its order of work, and its short run; with torchtitan's trainer: tests/titan/test_inspect.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import titan_adam_mini.checkpoint.stored as checkpoint_stored
import titan_adam_mini.inspect.heat_map as picture
import titan_adam_mini.inspect.moments as moments_file
from titan_adam_mini import Partition
from titan_adam_mini.inspect import Moments, command, short_run, tables
from titan_adam_mini.inspect.command import Inspect

SHAPES = {"layers.0.attention.wq.weight": (4, 4), "norm.weight": (4,)}


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.toml"
    file.touch()
    return str(file)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command does, in order, with what needs torchtitan or a checkpoint put in."""
    seen: list[str] = []

    def step(module: ModuleType, name: str, made: Callable[..., Any]) -> None:
        def call(*args: Any) -> Any:
            seen.append(name)
            return made(*args)

        monkeypatch.setattr(module, name, call)

    @contextmanager
    def trained(*args: Any) -> Iterator[Path]:
        yield Path("step-3")

    moments = [Moments.of(name, torch.rand(shape) + 1) for name, shape in SHAPES.items()]
    step(command, "in_isolated_process", lambda *_: ("llama3 tiny", Partition.transformer(n_heads=2), SHAPES, []))
    step(checkpoint_stored, "Stored", lambda path: path)
    step(moments_file, "stored_moments", lambda stored, shapes: moments)
    step(command, "short_run", trained)
    step(command, "write_json", command.write_json)
    step(tables, "show", tables.show)
    step(picture, "heat_map", lambda *args: None)
    return seen


def run(config: str, **flags: Any) -> str:
    console = Console(file=StringIO(), width=200)
    Inspect(config, **flags)(console, ["--job.config_file", config])
    return console.file.getvalue()


def test_the_partition_is_read_before_anything_is_trained(config: str, done: list[str], tmp_path: Path) -> None:
    run(config, steps=3, out=tmp_path / "out", json=str(tmp_path / "told.json"))
    assert done == ["in_isolated_process", "short_run", "Stored", "stored_moments", "write_json", "show", "heat_map"]
    done.clear()
    run(config, checkpoint=tmp_path / "step-9")
    assert done == ["Stored", "in_isolated_process", "stored_moments", "show"]


def test_what_the_configuration_gets_wrong_is_said_before_the_run(
    config: str, done: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuses(*args: Any) -> Any:
        raise ValueError("pattern 'wqq.weight' matches no parameter")

    monkeypatch.setattr(command, "in_isolated_process", refuses)
    with pytest.raises(ValueError, match="wqq"):
        run(config, steps=3, out=tmp_path / "out")
    assert done == [] and not (tmp_path / "out").exists()


def test_table_and_json_are_there_when_the_picture_fails(
    config: str, done: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(picture, "heat_map", fails)
    with pytest.raises(OSError, match="no space"):
        run(config, checkpoint=tmp_path, out=tmp_path / "out", json=str(tmp_path / "told.json"))
    assert json.loads((tmp_path / "told.json").read_text())["model"] == "llama3 tiny"
    assert done[-1] == "show"


def test_flags_that_cannot_be_served(
    config: str, done: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "used" / "run").mkdir(parents=True)
    for flags, told in (
        ({"steps": 3, "out": Path(config)}, "is a file: name a folder"),
        ({"steps": 3, "json": str(tmp_path)}, "is a folder: name a file in it"),
        ({"checkpoint": tmp_path, "ngpu": 2}, "--ngpu is for the run of --steps"),
        ({"steps": 3, "ngpu": 0}, "must be a positive number, not 0"),
        ({"steps": 3, "out": tmp_path / "used"}, "torchtitan would resume from its checkpoints"),
    ):
        with pytest.raises(ValueError, match=told):
            run(config, **flags)
    run(config, checkpoint=tmp_path, out=tmp_path / "used")
    monkeypatch.setenv("NGPU", "many")
    run(config, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="must be a positive number, not many"):
        run(config, steps=3)
    done.clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        run(config, steps=3, ngpu=1, out=tmp_path / "out")
    assert done == []


# The short run


@pytest.mark.parametrize(
    ("steps", "total", "planned", "want"),
    [(200, None, 120, 200), (20, None, 120, 120), (20, 15, 120, 20), (5, 15, 120, 15)],
)
def test_no_step_lies_past_the_end_of_the_schedule(steps: int, total: int | None, planned: int, want: int) -> None:
    config = SimpleNamespace(
        lr_scheduler=SimpleNamespace(total_steps=total),
        training=SimpleNamespace(steps=planned),
        experimental=SimpleNamespace(custom_import=""),
    )
    settings = short_run.settings_of(config, steps)
    assert settings[settings.index("--lr_scheduler.total_steps") + 1] == str(want)
    assert settings[settings.index("--training.steps") + 1] == str(steps)


@pytest.mark.parametrize(("given", "module"), [(None, "torchtitan.train"), ("", "torchtitan.train"), ("a.b", "a.b")])
def test_the_trainer_is_the_one_of_train_file(
    given: str | None, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRAIN_FILE", raising=False)
    if given is not None:
        monkeypatch.setenv("TRAIN_FILE", given)
    words: list[str] = []

    def popen(command: list[str], **options: Any) -> Any:
        words.extend(command)
        return SimpleNamespace(wait=lambda: 0, poll=lambda: 0)

    monkeypatch.setattr(short_run.subprocess, "Popen", popen)
    short_run._train(["--training.steps", "3"], 2, tmp_path / "log")
    assert words[-4:] == ["-m", module, "--training.steps", "3"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_is_not_kept_is_gone_when_reading_is_ended(
    kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(short_run, "_train", lambda words, ranks, log: log.touch())
    console, out = Console(file=StringIO()), tmp_path if kept else None
    with pytest.raises(SystemExit) as ended, short_run.short_run([], 3, 1, out, console) as path:
        assert (path.parents[1] / "log").exists()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [one.name for one in tmp_path.iterdir()] == (["run"] if kept else [])
