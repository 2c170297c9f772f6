"""What a start finds in a run's folder, and what is handed to Slurm."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import record

from titan_adam_mini.compare import work as work_module
from titan_adam_mini.compare.plan import Plan, Run
from titan_adam_mini.compare.training import LOCK, Training, _prepare, steps_saved
from titan_adam_mini.compare.work import RECORD, Work


def checkpoint(folder: Path, step: int, whole: bool = True) -> None:
    there = folder / "checkpoint" / f"step-{step}"
    there.mkdir(parents=True)
    if whole:
        (there / ".metadata").touch()


@pytest.mark.parametrize(
    ("known", "kept"), [(25, [10, 20]), (30, [10, 20]), (19, [10]), (9, []), (0, [])], ids=lambda value: str(value)
)
def test_a_start_goes_on_from_what_is_on_record(tmp_path: Path, known: int, kept: list[int]) -> None:
    for step in (10, 20, 40):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, whole=False)
    (tmp_path / "tb").mkdir()
    for name in (LOCK, "train.log"):
        (tmp_path / name).touch()
    assert _prepare(tmp_path, known) == max(kept, default=0)
    assert list(steps_saved(tmp_path)) == kept
    assert [one.name for one in (tmp_path / "checkpoint").glob("*")] == [
        f"step-{step}" for step in sorted(kept)
    ] or kept
    left = {one.name for one in tmp_path.iterdir()}
    assert left == ({LOCK, "train.log", "tb", "checkpoint"} if kept else {LOCK}), "or the trainer begins anew"


def test_a_trainer_of_another_command_is_waited_for(tmp_path: Path) -> None:
    """A process that holds the lock, as one whose command was killed does."""
    (tmp_path / "train.log").write_text(
        "step:  7  loss:  3.25000  grad_norm:  1.0\nvalidate step:  8  loss:  9.0\nstep: 9"
    )
    program = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", program + "print('held', flush=True); sys.stdin.read()", str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        training = Training(tmp_path, ["nothing"], ranks=1, shown=0, variables={})
        assert training.adopted and training.running()
        assert (training.step, training.loss) == (7, "3.25000"), "the last line is not whole yet"
        training.end()
        assert training.running(), "it is not this command's to end"
        holder.communicate()
    assert not training.running() and training.failure == ""
    training.close()


def test_a_failure_is_told_by_its_error(tmp_path: Path) -> None:
    words = ["--job.config_file", str(tmp_path / "nowhere.toml")]
    training = Training(tmp_path / "run", words, ranks=1, shown=0, variables=dict(os.environ))
    while training.running():
        time.sleep(0.1)
    training.close()
    assert training.failure.startswith("FileNotFoundError: ") and "nowhere.toml" in training.failure
    assert "(status 1; log: " in training.failure


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Two variants, two seeds; nothing is done."""
    common = ["--job.config_file", "a.toml", "--training.dataset_path", "/my data"]
    return Work(
        out=tmp_path,
        plan=Plan({"AdamW": 1e-3, "mini": 2e-3}, [], 2),
        variants={"AdamW": [*common, "--optimizer.name", "AdamW"], "mini": [*common, "--optimizer.name", "AdamMini"]},
        ranks=1,
        shown={"AdamW": 0, "mini": 0},
        steps=4,
        frequency=2,
        saves=False,
        own_start=False,
        variables=[{}],
    )


def test_a_line_of_flags_for_every_run(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(Work, "make_start", lambda self, seed: made.append(seed))
    done = Run("AdamW", 1e-3, 0)
    work.records[done] = record(done, [2.0] * 4, {4: 2.0})
    told = work.hand_over("a.toml")
    lines = [shlex.split(line) for line in (work.out / "sweep.txt").read_text().splitlines()]
    names = [(line[line.index("--optimizer.name") + 1], line[line.index("--debug.seed") + 1]) for line in lines]
    assert names == [("AdamMini", "0"), ("AdamW", "1"), ("AdamMini", "1")] and made == [0, 1]
    assert lines[0][:2] == ["--training.dataset_path", "/my data"]
    assert lines[0][-2:] == ["--job.dump_folder", str(work.out / "runs/mini/lr-0.002/seed-0")]
    assert f"SWEEP={work.out}/sweep.txt CONFIG_FILE={Path('a.toml').absolute()}" in told and "--array=0-2 " in told
    # As the batch script reads them: xargs keeps what is quoted together.
    first = (work.out / "sweep.txt").read_text().splitlines()[0]
    seen = subprocess.run(
        ["xargs", "-n", "1", "printf", "%s\\n"], input=first, capture_output=True, text=True, check=True
    )
    assert seen.stdout.splitlines() == lines[0]
    for run in work.todo():
        work.records[run] = record(run, [2.0] * 4, {4: 2.0})
    assert work.hand_over("a.toml") == ""


def test_a_seed_may_have_data_of_its_own(work: Work) -> None:
    work.variants["AdamW"] += ["--training.dataset_path", "data/order-{seed}"]
    words = [work.words(Run("AdamW", 1e-3, seed)) for seed in (0, 2)]
    assert ["data/order-0" in words[0], "data/order-2" in words[1]] == [True, True]
    assert "{seed}" in " ".join(work.variants["AdamW"])


def test_runs_from_elsewhere_are_taken_up(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[Run, Any] = {
        Run("AdamW", 1e-3, 0): record(Run("AdamW", 1e-3, 0), [2.0] * 4, {1: 2.0, 2: 2.0, 4: 2.0}),
        Run("mini", 2e-3, 0): record(Run("mini", 2e-3, 0), [2.0] * 4, {1: 2.0, 2: 2.0}),
        Run("AdamW", 1e-3, 1): record(Run("AdamW", 1e-3, 1), [2.0, 3.5], {1: 2.0}, diverged=2),
    }
    monkeypatch.setattr(work_module, "read", lambda board, run, ranks: there.get(run, record(run, [], {})))
    for run in there:
        (work.out / run.folder).mkdir(parents=True)
        checkpoint(work.out / run.folder, 2)
        checkpoint(work.out / run.folder, 4)
    work.collect()
    assert set(work.records) == {Run("AdamW", 1e-3, 0), Run("AdamW", 1e-3, 1)}, "the last validation is missing"
    folder = work.out / Run("AdamW", 1e-3, 0).folder
    assert (folder / "losses.txt").read_text() == "1 2.0\n2 2.0\n3 2.0\n4 2.0\n", "as torchtitan exports them"
    assert list(steps_saved(folder)) == [4], "nobody goes on from the others"
    assert list(steps_saved(work.out / Run("mini", 2e-3, 0).folder)) == [2, 4]
    monkeypatch.setattr(work_module, "read", lambda board, run, ranks: record(run, [], {}))
    work.records.clear()
    work.collect()
    assert set(work.records) == {Run("AdamW", 1e-3, 0), Run("AdamW", 1e-3, 1)}, f"from {RECORD}"
