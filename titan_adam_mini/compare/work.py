"""The runs of a comparison, done on this machine: several at once, each once, from one start per seed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..files import atomic_write
from .plan import Plan, Run
from .record import Record, read
from .training import BOARD, CHECKPOINTS, LOCK, Training, at_work, steps_saved

RECORD, EXPORT, MADE = "record.json", "losses.txt", "made.json"
_LOOK, _TELL = 0.5, 30.0
"""Seconds between two looks at the runs, and between two lines about a run where output is no terminal."""
_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
)


@dataclass
class Work:
    """What all runs of a comparison have in common.

    Attributes:
        out: the comparison's folder.
        plan: which runs there are to be.
        variants: name -> torchtitan's command line for it, the configuration among it.
        ranks: processes of a run.
        shown: variant -> the rank that knows the loss.
        steps: training steps of a run.
        frequency: steps between validations.
        saves: whether runs keep checkpoints to go on from.
        own_start: whether the configuration itself says which checkpoint runs start from.
        variables: environment variables, one mapping for each of the runs that may be at work at once.
        made: device, versions and commit of runs that are begun, or handed over, now.
        records: what is done.
    """

    out: Path
    plan: Plan
    variants: Mapping[str, list[str]]
    ranks: int
    shown: Mapping[str, int]
    steps: int
    frequency: int
    saves: bool
    own_start: bool
    variables: list[dict[str, str]]
    made: dict[str, str]
    records: dict[Run, Record] = field(default_factory=dict)

    def todo(self) -> list[Run]:
        """The runs still to be done, as far as can be known now."""
        return self.plan.wanted(self.losses())

    def collect(self) -> None:
        """Take up what earlier commands, or jobs elsewhere, have finished."""
        for file in self.out.glob(f"runs/*/*/*/{RECORD}"):
            record = Record.load(file)
            if record.run.variant in self.variants:
                self.records[record.run] = record
        while [run for run in self.todo() if self._settle(run)]:
            pass  # what is done may say what else is to be done

    def words(self, run: Run) -> list[str]:
        """torchtitan's command line for a run, without its folder."""
        words = [
            *seeded(self.variants[run.variant], run.seed),
            "--optimizer.lr",
            str(run.lr),
            "--debug.seed",
            str(run.seed),
        ]
        words += ["--metrics.log_freq", "1", "--metrics.enable_tensorboard", "--metrics.save_tb_folder", BOARD]
        words += ["--metrics.no-save_for_all_ranks", "--metrics.disable_color_printing"]
        words += ["--checkpoint.enable", "--checkpoint.folder", CHECKPOINTS, "--checkpoint.initial_load_model_only"]
        if not self.saves:
            words += ["--checkpoint.load_only"]
        if not self.own_start:
            words += ["--checkpoint.initial_load_path", str(self.start(run.seed))]
        return words

    def start(self, seed: int) -> Path:
        """The checkpoint that all runs with this seed start from."""
        return self.out / f"seeds/seed-{seed}" / CHECKPOINTS / "step-0"

    def make_start(self, seed: int) -> None:
        """Write that checkpoint, unless it is there: on one rank, which holds the whole model.

        Raises:
            ValueError: the trainer failed.
        """
        folder = self.start(seed).parents[1]
        while not self.own_start and 0 not in steps_saved(folder):
            words = [*seeded(next(iter(self.variants.values())), seed), "--debug.seed", str(seed)]
            words += ["--checkpoint.create_seed_checkpoint", "--checkpoint.enable", "--checkpoint.folder", CHECKPOINTS]
            words += ["--checkpoint.last_save_model_only", "--checkpoint.no-last_save_in_hf"]
            words += ["--checkpoint.export_dtype", "float32", "--validation.no-enable", "--compile.no-enable"]
            words += ["--activation_checkpoint.mode", "none"]  # one of them needs compile
            for name in _DEGREES:
                words += [f"--parallelism.{name}", "1"]
            training = Training(folder, words, ranks=1, shown=0, variables=self.variables[0])
            try:
                while training.running():
                    time.sleep(_LOOK)
            finally:
                training.end()
                training.close()
            if not training.adopted and 0 not in steps_saved(folder):
                raise ValueError(f"the start of seed {seed} could not be made: {training.failure or 'no checkpoint'}")

    def hand_over(self, config: str) -> str:
        """Write the wanted runs into a file, one line of torchtitan's flags each, for launch/slurm/sweep.sbatch.

        The file is called after its content and never changes: tasks of an array read it whenever they start.

        Args:
            config: the TOML file.

        Returns:
            The command that submits them; "" if there is none to do.
        """
        runs = self.todo()
        if not runs:
            return ""
        for seed in sorted({run.seed for run in runs}):
            self.make_start(seed)
        for run in runs:
            folder = self.out / run.folder
            ended = _attempts(folder)
            if not ended:
                self._say_made(folder)
            # A job that was killed after its last save and before the validation that follows would never validate.
            elif all(ended) and (last := steps_saved(folder).get(self.steps)):
                shutil.rmtree(last)
        folders = [["--job.dump_folder", str(self.out / run.folder)] for run in runs]
        # The batch script names the configuration itself.
        lines = [shlex.join([*self.words(run)[2:], *folder]) for run, folder in zip(runs, folders, strict=True)]
        text = "".join(f"{line}\n" for line in lines)
        file = self.out / f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        atomic_write(file, text)
        settings = [f"SWEEP={file}", f"CONFIG_FILE={Path(config).absolute()}", f"RANKS={self.ranks}"]
        settings += ["TITAN_ADAM_MINI_SAME_VALIDATION=1"]
        settings += [f"TRAIN_FILE={module}"] if (module := os.environ.get("TRAIN_FILE")) else []
        settings += ["NGPU=1"] if self.ranks == 1 else []  # whatever GPUs a node has
        nodes, told = "1", f"Submit the {len(runs)} runs:"
        if self.ranks > 1:
            nodes, told = "NODES", f"Submit the {len(runs)} runs, with as many NODES as make {self.ranks} ranks:"
        return f"{told}\n{shlex.join(settings)} sbatch -N {nodes} --array=0-{len(runs) - 1} launch/slurm/sweep.sbatch"

    def do(self, console: Console, done: Callable[[], object]) -> list[str]:
        """Do runs until there are none left to do.

        Args:
            console: for progress.
            done: called after every run.

        Returns:
            What went wrong, a sentence each: a variant of which a run failed is not gone on with, the others are.
        """
        free = list(self.variables)
        working: dict[Run, Training] = {}
        taken: dict[Run, dict[str, str]] = {}
        failed: dict[str, list[str]] = {}
        told = _Told(console, self.steps)
        earlier = self._earlier()
        try:
            with told:
                for run, variables in earlier.items():  # they have their GPUs already
                    working[run] = self._begin(run, variables)
                    if variables in free:
                        taken[run] = free.pop(free.index(variables))
                    told.begins(run, working[run])
                while (waiting := self._waiting(working, failed)) or working:
                    while free and waiting:
                        run = waiting.pop(0)
                        try:
                            self.make_start(run.seed)
                        except ValueError as error:  # no variant has another start
                            failed |= {name: [*failed.get(name, []), str(error)] for name in self.variants}
                            break
                        taken[run] = free.pop(0)
                        working[run] = self._begin(run, taken[run])
                        told.begins(run, working[run])
                    time.sleep(_LOOK if working else 0)
                    for run, training in list(working.items()):
                        running = training.running()
                        if running and training.diverged:
                            training.end()
                        elif running:
                            told.goes_on(run, training)
                            continue
                        training.close()
                        del working[run]
                        if run in taken:
                            free.append(taken.pop(run))
                        finished = self._settle(run)
                        why = ""
                        if not finished and not training.adopted:
                            why = training.failure or f"it ended at step {training.step} of {self.steps}: out of data?"
                            failed.setdefault(run.variant, []).append(f"the run {run} failed: {why}")
                        told.ends(run, training, self.records.get(run), why)
                        done()
                    told.total(self.plan.expected(self.losses()), len(self.todo()), working.values())
        finally:
            for training in working.values():
                training.ask()
            for training in working.values():
                training.end()
        return list(dict.fromkeys(chain(*failed.values())))

    def _waiting(self, working: Mapping[Run, Training], failed: Mapping[str, list[str]]) -> list[Run]:
        return [run for run in self.todo() if run not in working and run.variant not in failed]

    def _earlier(self) -> dict[Run, dict[str, str]]:
        """The runs that trainers of an earlier command are at work on -> the variables that those have."""
        runs = {self.out / run.folder: run for run in self.todo()}
        found: dict[Run, dict[str, str]] = {}
        for lock in self.out.glob(f"runs/*/*/*/{LOCK}"):
            if told := at_work(lock.parent):
                pid, variables = told
                if lock.parent not in runs:
                    raise ValueError(
                        f"a trainer of an earlier command is at work in {lock.parent}, which is no run that is wanted "
                        f"now: wait for it, or end it with kill {pid}"
                    )
                found[runs[lock.parent]] = variables
        return found

    def _begin(self, run: Run, variables: Mapping[str, str]) -> Training:
        folder = self.out / run.folder
        known = read(folder / BOARD, run, self.ranks).known(self.frequency) if self.saves else 0
        shown = self.shown[run.variant]
        begun = Training(folder, self.words(run), ranks=self.ranks, shown=shown, variables=variables, known=known)
        if not begun.adopted:
            self._say_made(folder)
        return begun

    def _say_made(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / MADE, json.dumps(self.made))

    def _settle(self, run: Run) -> bool:
        """Whether a run is over; what it said is then on record, and its checkpoints but the last are gone."""
        folder = self.out / run.folder
        record = read(folder / BOARD, run, self.ranks)
        # A job elsewhere that was killed between a save and the validation after it leaves that validation out.
        if record.diverged is None and (record.steps < self.steps or self.steps not in record.validation):
            return False
        lines = [f"{step} {loss}\n" for step, loss in enumerate(record.losses, 1)]
        atomic_write(folder / EXPORT, "".join(lines))
        record.made = json.loads(made.read_text()) if (made := folder / MADE).is_file() else {}
        record.write(folder / RECORD)
        self.records[run] = record
        for step, checkpoint in steps_saved(folder).items():
            if step < self.steps:
                shutil.rmtree(checkpoint)
        return True

    def losses(self) -> dict[Run, float]:
        """Finished run -> its last validation loss, infinite if it diverged."""
        return {run: record.final for run, record in self.records.items()}


def _attempts(folder: Path) -> list[bool]:
    """Of each attempt of launch/slurm at a run: whether it has ended, as far as is known."""
    return [json.loads(one.read_text())["ended"] is not None for one in folder.glob("attempts/*/begun.json")]


def seeded(words: list[str], seed: int) -> list[str]:
    """A command line with the seed's number where it says `{seed}`, such as in the path of a data set."""
    return [word.replace("{seed}", str(seed)) for word in words]


class _Told:
    """Progress: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._all: TaskID | None = None
        self._tasks: dict[Run, TaskID] = {}
        self._said: dict[Run, float] = {}

    def __enter__(self) -> _Told:
        self._bars.start()
        self._all = self._bars.add_task("all steps", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begins(self, run: Run, training: Training) -> None:
        self._tasks[run] = self._bars.add_task(str(run), total=self._steps)
        self._said[run] = time.monotonic()
        if training.adopted:
            self._say(f"{run}: still at work since an earlier command; waiting for it")
        elif training.goes_on_from:
            self._say(f"{run}: goes on from the checkpoint of step {training.goes_on_from}")
        elif not self._console.is_terminal:
            self._say(f"{run}: begins")

    def goes_on(self, run: Run, training: Training) -> None:
        description = f"{run}: loss {training.loss}" if training.loss else str(run)
        self._bars.update(self._tasks[run], completed=training.step, description=description)
        if not self._console.is_terminal and time.monotonic() >= self._said[run] + _TELL:
            self._said[run] = time.monotonic()
            self._say(f"{run}: step {training.step} of {self._steps}, loss {training.loss or 'not known yet'}")

    def ends(self, run: Run, training: Training, record: Record | None, why: str) -> None:
        self._bars.remove_task(self._tasks.pop(run))
        if why:
            self._say(f"{run}: failed: {why}; no more runs of {run.variant}")
        elif record is None:
            self._say(f"{run}: ended at step {training.step}")
        elif record.diverged is not None:
            self._say(f"{run}: diverged at step {record.diverged}")
        else:
            self._say(f"{run}: validation loss {record.final:.4f} after step {record.steps}")

    def total(self, expected: int, left: int, working: Collection[Training]) -> None:
        done = expected - left
        steps = done * self._steps + sum(training.step for training in working)
        if self._all is not None:
            described = f"{done} of {expected} runs"
            self._bars.update(self._all, completed=steps, total=expected * self._steps, description=described)

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
