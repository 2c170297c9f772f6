"""The command from end to end on a small model: killed and started again, it reports what an undisturbed one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comparisons import RUNS, check_comparison

from titan_adam_mini.cli import main
from titan_adam_mini.compare.command import _check_data, _check_validation, _devices, _signals
from titan_adam_mini.compare.plan import Run
from titan_adam_mini.compare.record import Record

from .conftest import BATCH, CONFIG, SEQ_LEN

STEPS, EVERY = 80, 20
ONE = "--optimizers=AdamMini"
"""Where a single variant does, since the configuration of each is read."""


@pytest.fixture(scope="session")
def words(corpus_dir: Path) -> list[str]:
    """A comparison of AdamW and AdamMini with one seed, that saves and validates every EVERY steps."""
    settings = {
        "model.hf_assets_path": corpus_dir / "tokenizer",
        "training.dataset_path": corpus_dir / "train-1",
        "training.seq_len": SEQ_LEN,
        "training.local_batch_size": BATCH,
        "training.steps": STEPS,
        "validation.dataset_path": corpus_dir / "validation",
        "validation.seq_len": SEQ_LEN,
        "validation.local_batch_size": 2,
        "validation.freq": EVERY,
        "validation.steps": 2,
        "checkpoint.interval": EVERY,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["compare", str(CONFIG), "--seeds", "1", *flags, "--validation.enable", "--checkpoint.enable"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--optimizers", "AdamW,Lion"], "the optimizer 'Lion' is unknown"),
        (["--seeds", "0"], "--seeds must be 1 or more, not 0"),
        (["--jobs", "0"], "--jobs must be 1 or more, not 0"),
        (["--lr", "1e-3,fast"], "--lr takes learning rates such as 1e-3,2e-3, not 'fast'"),
        (["--lr", "-1"], "not '-1'"),
        (["--lr", "1e-3", "--variant", "a=AdamW --optimizer.lr 1"], "sets --optimizer.lr, and --lr"),
        ([ONE, "--training.stepps", "3"], "torchtitan does not take these arguments"),
        ([ONE, "--validation.no-enable"], "there is no validation set"),
        ([ONE, "--validation.freq", "7"], "the last of 80 steps would not be validated"),
        (
            [ONE, "--validation.seq_len", "128"],
            "the model is built for training.seq_len, 64: give --validation.seq_len 64",
        ),
        ([ONE, "--optimizer.adam_mini.roles", "*.nothing=neuron"], "'*.nothing' matches no parameter"),
        (["--variant", "a=AdamMini --training.seq_len 32"], "cannot be compared: training.seq_len is 64 for AdamW"),
        ([ONE, "--seeds", "2", "--checkpoint.initial_load_path", "a"], "give --seeds 1"),
        (
            [ONE, "--checkpoint.initial_load_path", "a", "--checkpoint.no-initial_load_model_only"],
            "leave checkpoint.initial_load_model_only true",
        ),
    ],
)
def test_what_is_refused_before_anything_is_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "out"), *more])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "titan-adam-mini: " in error and told in error, error
    assert not (tmp_path / "out").exists()


def test_a_frequency_of_zero_validates_no_step() -> None:
    with pytest.raises(ValueError, match="the last of 4 steps would not be validated"):
        _check_validation({"validation": {"enable": True, "freq": 0}, "training": {"steps": 4}})


def test_data_that_are_missing_for_a_later_seed(tmp_path: Path) -> None:
    (tmp_path / "order-0").mkdir()
    told = {"training": {"dataset_path": f"{tmp_path}/order-{{seed}}"}, "validation": {"dataset_path": None}}
    _check_data(told, 1)
    with pytest.raises(
        ValueError, match=r"training.dataset_path .* is missing for some of the 3 seeds: .*order-1, .*-2$"
    ):
        _check_data(told, 3)
    _check_data({**told, "training": {"dataset_path": "hub/name-{seed}"}}, 3)


def test_a_configuration_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "nowhere.toml"])
    assert ended.value.code == 1 and "there is no configuration nowhere.toml" in capsys.readouterr().err


def test_every_run_at_once_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _devices(2, 3) == [{}, {}, {}], "the CPU is not shared out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _devices(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert _devices(1, 2) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(ValueError, match="3 runs of 2 ranks at once need 6 GPUs, and there are 4"):
        _devices(2, 3)


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _signals():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def records(out: Path) -> dict[Run, Record]:
    return {run: Record.load(out / run.folder / "record.json") for run in RUNS}


@pytest.fixture(scope="session")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that nobody touched, both runs at once."""
    out = tmp_path_factory.mktemp("undisturbed")
    main([*words, "--out", str(out), "--jobs", "2"])
    return out


@pytest.mark.nightly
def test_a_comparison(undisturbed: Path) -> None:
    check_comparison(undisturbed, [1, *range(EVERY, STEPS + 1, EVERY)], falls_to=0.8)
    checkpoints = {one.name for run in RUNS for one in (undisturbed / run.folder / "checkpoint").iterdir()}
    assert checkpoints == {f"step-{STEPS}"}, "nobody goes on from the others"


def wait_for(log: Path, step: int, command: "subprocess.Popen[str]") -> None:
    """Until a run's log has a step."""
    end = time.monotonic() + 300
    while not (log.is_file() and f"step: {step:2}  loss" in log.read_text(errors="replace")):
        assert time.monotonic() < end and command.poll() is None
        time.sleep(0.005)


@pytest.mark.nightly
def test_killed_and_started_again(
    words: list[str], undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command is killed in the first run, whose trainer lives on, and in the second, with the trainer."""
    out = tmp_path / "out"
    adamw, mini = (out / run.folder for run in RUNS)

    def command() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "titan_adam_mini.cli", *words, "--out", str(out)], stdout=subprocess.PIPE, text=True
        )

    first = command()
    wait_for(adamw / "train.log", 5, first)
    first.kill()
    assert "started" in first.communicate()[0] and not (adamw / "record.json").exists()
    second = command()
    wait_for(mini / "train.log", EVERY + 5, second)
    second.kill()
    os.kill(json.loads((mini / "lock").read_text())[0], signal.SIGKILL)
    told = second.communicate()[0]
    assert "AdamW, lr 0.004, seed 0: still running since an earlier command" in told or (
        "AdamW" not in told and (adamw / "record.json").exists()
    ), "unless it had ended before the second command looked"
    assert not (mini / "record.json").exists()
    done = {file: file.stat().st_mtime_ns for file in (adamw / "record.json", adamw / "train.log")}

    main([*words, "--out", str(out)])
    told = capfd.readouterr().out
    assert "AdamMini, lr 0.004, seed 0: resumes from the checkpoint of step" in told and "AdamW, lr" not in told
    assert done == {file: file.stat().st_mtime_ns for file in done}, "what is done is not done again"
    mine, other = records(out), records(undisturbed)
    for run in RUNS:
        assert mine[run].losses == other[run].losses and mine[run].validation == other[run].validation, run
        assert (out / run.folder / "losses.txt").read_bytes() == (undisturbed / run.folder / "losses.txt").read_bytes()

    with pytest.raises(SystemExit):
        main([*words, "--out", str(out), "--training.max_norm", "2"])
    assert "training.max_norm 1.0 there, 2.0 here" in capfd.readouterr().err
