"""What a start finds in a run's folder, and what is handed to Slurm."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from made_up_runs import record
from rich.console import Console

from titan_adam_mini.compare import runner as runner_module
from titan_adam_mini.compare.plan import Plan, Run
from titan_adam_mini.compare.runner import RECORD, Runner
from titan_adam_mini.compare.training import LOCK, Training, _prepare, running_trainer, saved_checkpoints


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
    assert list(saved_checkpoints(tmp_path)) == kept
    assert {one.name for one in tmp_path.glob("checkpoint/*")} == {f"step-{step}" for step in kept}
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
        assert running_trainer(tmp_path) == (0, {}), "it was killed before it wrote more"
        told = json.dumps([holder.pid, {"CUDA_VISIBLE_DEVICES": "3"}])
        (tmp_path / LOCK).write_text(told)
        training = Training(tmp_path, ["nothing"], ranks=1, loss_rank=0, variables={})
        assert training.adopted and training.running() and training.variables == {"CUDA_VISIBLE_DEVICES": "3"}
        assert (training.step, training.loss) == (7, "3.25000"), "the last line is not whole yet"
        assert (tmp_path / LOCK).read_text() == told, "for the next command"
        training.stop()
        assert holder.wait(10) == -signal.SIGTERM, "whoever interrupts the command has its trainers end"
    assert not training.running() and training.failure == ""
    training.close()
    assert running_trainer(tmp_path) is None


@pytest.mark.slow
def test_a_failure_is_told_by_its_error(tmp_path: Path) -> None:
    arguments = ["--job.config_file", str(tmp_path / "nowhere.toml")]
    training = Training(tmp_path / "run", arguments, ranks=1, loss_rank=0, variables=dict(os.environ))
    while training.running():
        time.sleep(0.1)
    training.close()
    assert training.failure.startswith("FileNotFoundError: ") and "nowhere.toml" in training.failure
    assert "(status 1; log: " in training.failure


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """Two variants, two seeds; nothing is done."""
    common = ["--job.config_file", "a.toml", "--training.dataset_path", "/my data"]
    return Runner(
        out=tmp_path,
        plan=Plan({"AdamW": 1e-3, "mini": 2e-3}, [], 2),
        variants={"AdamW": [*common, "--optimizer.name", "AdamW"], "mini": [*common, "--optimizer.name", "AdamMini"]},
        ranks=1,
        loss_ranks={"AdamW": 0, "mini": 0},
        steps=4,
        validation_freq=2,
        saves=False,
        own_initial_checkpoint=False,
        variables=[{}],
        provenance={"device": "a CPU"},
    )


def test_a_line_of_flags_for_every_run(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(Runner, "make_initial_checkpoint", lambda self, seed: made.append(seed))
    monkeypatch.setenv("TRAIN_FILE", "my.train")
    done = Run("AdamW", 1e-3, 0)
    runner.records[done] = record(done, [2.0] * 4, {4: 2.0})
    told = runner.write_slurm_sweep("a.toml")
    [file] = runner.out.glob("sweep-*.txt")
    lines = [shlex.split(line) for line in file.read_text().splitlines()]
    names = [(line[line.index("--optimizer.name") + 1], line[line.index("--debug.seed") + 1]) for line in lines]
    assert names == [("AdamMini", "0"), ("AdamW", "1"), ("AdamMini", "1")] and made == [0, 1]
    assert lines[0][:2] == ["--training.dataset_path", "/my data"]
    assert lines[0][-2:] == ["--job.dump_folder", str(runner.out / "runs/mini/lr-0.002/seed-0")]
    assert f"SWEEP={file} CONFIG_FILE={Path('a.toml').absolute()} RANKS=1 " in told
    assert "TRAIN_FILE=my.train NGPU=1 sbatch -N 1 --array=0-2 " in told
    assert json.loads((runner.out / runner.remaining()[0].folder / "made.json").read_text()) == {"device": "a CPU"}
    # As the batch script reads them: xargs keeps what is quoted together.
    first = file.read_text().splitlines()[0]
    seen = subprocess.run(
        ["xargs", "-n", "1", "printf", "%s\\n"], input=first, capture_output=True, text=True, check=True
    )
    assert seen.stdout.splitlines() == lines[0]
    # Tasks that still wait read that file: fewer runs are another one.
    text, run = file.read_text(), runner.remaining()[0]
    runner.records[run] = record(run, [2.0] * 4, {4: 2.0})
    runner.ranks = 8
    told = runner.write_slurm_sweep("a.toml")
    assert file.read_text() == text and len(list(runner.out.glob("sweep-*.txt"))) == 2 and str(file) not in told
    assert (
        "with as many NODES as make 8 ranks:" in told and " RANKS=8 " in told and "sbatch -N NODES --array=0-1" in told
    )
    for run in runner.remaining():
        runner.records[run] = record(run, [2.0] * 4, {4: 2.0})
    assert runner.write_slurm_sweep("a.toml") == ""


def test_a_job_that_never_validated_its_last_step_does_that_step_again(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "make_initial_checkpoint", lambda self, seed: None)
    folders = [runner.out / run.folder for run in runner.remaining()[:2]]
    for folder, ended in zip(folders, (1.0, None), strict=True):
        checkpoint(folder, 2)
        checkpoint(folder, 4)
        (folder / "attempts/1").mkdir(parents=True)
        (folder / "attempts/1/begun.json").write_text(json.dumps({"ended": ended}))
    runner.write_slurm_sweep("a.toml")
    assert [list(saved_checkpoints(folder)) for folder in folders] == [[2], [2, 4]], "the other one may be at it"


class Trainer:
    """Stands for a training that says what it is told to: its run ends after some looks, or fails."""

    asked: ClassVar[list[str]] = []
    ended: ClassVar[list[str]] = []
    begun: ClassVar[list[tuple[str, str]]] = []
    """Run and GPU, in order."""
    at_once: ClassVar[set[str]] = set()
    alive: ClassVar[dict[str, str]] = {}
    """Run -> GPU of an earlier command's."""
    failing: ClassVar[set[str]] = set()
    resumed_step, diverged, step, loss = 0, False, 3, "2.0"

    def __init__(self, folder: Path, arguments: list[str], *, variables: dict[str, str], **_: object) -> None:
        self.name = str(folder.relative_to(folder.parents[3]))
        self.adopted = self.name in self.alive
        self.variables = {"GPU": self.alive.pop(self.name)} if self.adopted else variables
        assert self.variables["GPU"] not in self.at_once, "two on one GPU"
        self.at_once.add(self.variables["GPU"])
        self.begun.append((self.name, self.variables["GPU"]))
        self.left = 3 if self.adopted else 1
        self.failure = "out of memory" if self.name in self.failing else ""

    def running(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def close(self) -> None:
        self.at_once.remove(self.variables["GPU"])

    def request_stop(self) -> None:
        assert not self.ended, "all are asked before any is waited for"
        self.asked.append(self.name)

    def stop(self) -> None:
        self.ended.append(self.name)


@pytest.fixture
def trainers(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    """Two GPUs; every run that does not fail is on record once it has ended."""
    for one in (Trainer.begun, Trainer.at_once, Trainer.alive, Trainer.failing, Trainer.asked, Trainer.ended):
        one.clear()

    def finish(self: Runner, run: Run) -> bool:
        if run.folder not in Trainer.failing:
            self.records[run] = record(run, [2.0] * 4, {4: 2.0})
        return run in self.records

    monkeypatch.setattr(runner_module, "Training", Trainer)
    monkeypatch.setattr(runner_module, "_POLL", 0.001)

    def earlier(self: Runner) -> dict[Run, dict[str, str]]:
        return {run: {"GPU": Trainer.alive[run.folder]} for run in self.remaining() if run.folder in Trainer.alive}

    monkeypatch.setattr(Runner, "_running_trainers", earlier)
    monkeypatch.setattr(Runner, "make_initial_checkpoint", lambda self, seed: None)
    monkeypatch.setattr(Runner, "_finish", finish)
    runner.variables = [{"GPU": "0"}, {"GPU": "1"}]
    return Trainer


def test_a_variant_that_fails_does_not_end_the_others(runner: Runner, trainers: type[Trainer]) -> None:
    trainers.failing.add(Run("mini", 2e-3, 0).folder)
    said = io.StringIO()
    assert runner.run_all(Console(file=said), lambda: None) == ["the run mini, lr 0.002, seed 0 failed: out of memory"]
    assert set(runner.records) == {Run("AdamW", 1e-3, 0), Run("AdamW", 1e-3, 1)}
    assert len(trainers.begun) == 3, "its second seed would fail alike"
    assert "mini, lr 0.002, seed 0: failed: out of memory; no more runs of mini" in said.getvalue()


def test_a_trainer_of_another_command_keeps_its_gpu(runner: Runner, trainers: type[Trainer]) -> None:
    last = runner.remaining()[-1].folder
    trainers.alive[last] = "1"
    assert runner.run_all(Console(file=io.StringIO()), lambda: None) == []
    assert trainers.begun[0] == (last, "1") and {gpu for _, gpu in trainers.begun[1:3]} == {"0"}
    assert runner.remaining() == [] and len(trainers.begun) == 4
    # One that was begun with more GPUs than this command has takes none of its own.
    runner.records.clear()
    trainers.begun.clear()
    trainers.alive[last] = "7"
    assert runner.run_all(Console(file=io.StringIO()), lambda: None) == []
    assert {gpu for _, gpu in trainers.begun[1:]} == {"0", "1"}


def test_a_seed_may_have_data_of_its_own(runner: Runner) -> None:
    runner.variants["AdamW"] += ["--training.dataset_path", "data/order-{seed}"]
    arguments = [runner.arguments(Run("AdamW", 1e-3, seed)) for seed in (0, 2)]
    assert ["data/order-0" in arguments[0], "data/order-2" in arguments[1]] == [True, True]
    assert "{seed}" in " ".join(runner.variants["AdamW"])


def test_runs_from_elsewhere_are_taken_up(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[Run, Any] = {
        Run("AdamW", 1e-3, 0): record(Run("AdamW", 1e-3, 0), [2.0] * 4, {1: 2.0, 2: 2.0, 4: 2.0}),
        Run("mini", 2e-3, 0): record(Run("mini", 2e-3, 0), [2.0] * 4, {1: 2.0, 2: 2.0}),
        Run("mini", 2e-3, 1): record(Run("mini", 2e-3, 1), [2.0] * 4, {1: 2.0, 4: 2.0}),
        Run("AdamW", 1e-3, 1): record(Run("AdamW", 1e-3, 1), [2.0, 3.5], {1: 2.0}, diverged=2),
    }
    monkeypatch.setattr(runner_module, "read", lambda board, run, ranks: there.get(run, record(run, [], {})))
    runner._write_provenance(runner.out / Run("AdamW", 1e-3, 0).folder)
    for run in there:
        (runner.out / run.folder).mkdir(parents=True, exist_ok=True)
        checkpoint(runner.out / run.folder, 2)
        checkpoint(runner.out / run.folder, 4)
    runner.collect()
    found = {Run("AdamW", 1e-3, 0), Run("AdamW", 1e-3, 1), Run("mini", 2e-3, 1)}
    assert set(runner.records) == found, (
        "the last validation is missing in one, and an earlier one, which may be, in another"
    )
    made = [runner.records[run].made for run in sorted(found)]
    assert made == [{"device": "a CPU"}, {}, {}], "of those who began a run, not of those who found it done"
    folder = runner.out / Run("AdamW", 1e-3, 0).folder
    assert (folder / "losses.txt").read_text() == "1 2.0\n2 2.0\n3 2.0\n4 2.0\n", "as torchtitan exports them"
    assert list(saved_checkpoints(folder)) == [4], "nobody goes on from the others"
    assert list(saved_checkpoints(runner.out / Run("mini", 2e-3, 0).folder)) == [2, 4]
    monkeypatch.setattr(runner_module, "read", lambda board, run, ranks: record(run, [], {}))
    runner.records.clear()
    runner.collect()
    assert set(runner.records) == found, f"from {RECORD}"


def test_interrupted_it_ends_its_trainers(runner: Runner, trainers: type[Trainer]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_all(Console(file=io.StringIO()), interrupted)  # after the first run, with another running
    assert len(trainers.begun) == 2 and trainers.asked == trainers.ended == [trainers.begun[1][0]]


def test_trainers_of_earlier_commands(runner: Runner) -> None:
    """A lock that somebody holds: of a run that is wanted, with its GPU, or of one that is not."""
    program = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); "
    program += "print('held', flush=True); sys.stdin.read()"
    run = runner.remaining()[-1]
    lock = runner.out / run.folder / LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text('[1234, {"GPU": "1"}]')
    assert runner._running_trainers() == {}, "nobody holds it"
    with subprocess.Popen([sys.executable, "-c", program, str(lock)], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert runner._running_trainers() == {run: {"GPU": "1"}}
        runner.records[run] = record(run, [2.0] * 4, {4: 2.0})
        with pytest.raises(ValueError, match=r"not a run of this command: wait for it, or stop it with kill 1234"):
            runner._running_trainers()
        holder.communicate()
