"""Runs the trainings of a comparison: several at once, each only once, from one initial checkpoint per seed."""

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
from .training import CHECKPOINTS, LOCK, TENSORBOARD, Training, running_trainer, saved_checkpoints

RECORD, LOSSES, PROVENANCE = "record.json", "losses.txt", "made.json"
_POLL, _LOG_INTERVAL = 0.5, 30.0
"""Seconds between two checks of the runs, and between two lines about a run where output is not a terminal."""
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
class Runner:
    """Runs a comparison, and collects its records.

    Attributes:
        out: the comparison's folder.
        plan: the runs of the comparison.
        variants: name -> its torchtitan command line, with the configuration.
        ranks: processes of a run.
        loss_ranks: variant -> the rank that reports the loss.
        steps: training steps of a run.
        validation_freq: steps between validations.
        saves: whether runs save checkpoints to resume from.
        own_initial_checkpoint: whether the configuration itself names the checkpoint that runs start from.
        variables: environment variables, one mapping for each concurrent run.
        provenance: device, versions and commit of the runs started or submitted by this command.
        records: the finished runs.
    """

    out: Path
    plan: Plan
    variants: Mapping[str, list[str]]
    ranks: int
    loss_ranks: Mapping[str, int]
    steps: int
    validation_freq: int
    saves: bool
    own_initial_checkpoint: bool
    variables: list[dict[str, str]]
    provenance: dict[str, str]
    records: dict[Run, Record] = field(default_factory=dict)

    def remaining(self) -> list[Run]:
        """The runs that can be determined now and are not finished."""
        return self.plan.remaining(self.losses())

    def collect(self) -> None:
        """Add the runs that earlier commands, or Slurm jobs, have finished."""
        for file in self.out.glob(f"runs/*/*/*/{RECORD}"):
            record = Record.load(file)
            if record.run.variant in self.variants:
                self.records[record.run] = record
        while [run for run in self.remaining() if self._finish(run)]:
            pass  # finished runs may determine further ones

    def arguments(self, run: Run) -> list[str]:
        """torchtitan's command line for a run, without its folder."""
        arguments = [
            *seeded(self.variants[run.variant], run.seed),
            "--optimizer.lr",
            str(run.lr),
            "--debug.seed",
            str(run.seed),
        ]
        arguments += [
            "--metrics.log_freq",
            "1",
            "--metrics.enable_tensorboard",
            "--metrics.save_tb_folder",
            TENSORBOARD,
        ]
        arguments += ["--metrics.no-save_for_all_ranks", "--metrics.disable_color_printing"]
        arguments += ["--checkpoint.enable", "--checkpoint.folder", CHECKPOINTS, "--checkpoint.initial_load_model_only"]
        if not self.saves:
            arguments += ["--checkpoint.load_only"]
        if not self.own_initial_checkpoint:
            arguments += ["--checkpoint.initial_load_path", str(self.initial_checkpoint(run.seed))]
        return arguments

    def initial_checkpoint(self, seed: int) -> Path:
        """The initial checkpoint of all runs with this seed."""
        return self.out / f"seeds/seed-{seed}" / CHECKPOINTS / "step-0"

    def make_initial_checkpoint(self, seed: int) -> None:
        """Write the initial checkpoint of a seed, unless it exists: on one rank, with the full model.

        Raises:
            ValueError: the trainer failed.
        """
        folder = self.initial_checkpoint(seed).parents[1]
        while not self.own_initial_checkpoint and 0 not in saved_checkpoints(folder):
            arguments = [*seeded(next(iter(self.variants.values())), seed), "--debug.seed", str(seed)]
            arguments += [
                "--checkpoint.create_seed_checkpoint",
                "--checkpoint.enable",
                "--checkpoint.folder",
                CHECKPOINTS,
            ]
            arguments += ["--checkpoint.last_save_model_only", "--checkpoint.no-last_save_in_hf"]
            arguments += ["--checkpoint.export_dtype", "float32", "--validation.no-enable", "--compile.no-enable"]
            arguments += ["--activation_checkpoint.mode", "none"]  # "memory_budget" needs compile
            for name in _DEGREES:
                arguments += [f"--parallelism.{name}", "1"]
            training = Training(folder, arguments, ranks=1, loss_rank=0, variables=self.variables[0])
            try:
                while training.running():
                    time.sleep(_POLL)
            finally:
                training.stop()
                training.close()
            if not training.adopted and 0 not in saved_checkpoints(folder):
                reason = training.failure or "it wrote no checkpoint"
                raise ValueError(f"the initial checkpoint of seed {seed} could not be created: {reason}")

    def write_slurm_sweep(self, config: str) -> str:
        """Write the remaining runs to a file for launch/slurm/sweep.sbatch, one line of torchtitan's flags per run.

        The file is named after its content and never changes: tasks of an array read it whenever they start.

        Args:
            config: the TOML file.

        Returns:
            The command that submits them; "" if no runs remain.
        """
        runs = self.remaining()
        if not runs:
            return ""
        for seed in sorted({run.seed for run in runs}):
            self.make_initial_checkpoint(seed)
        for run in runs:
            folder = self.out / run.folder
            attempts_ended = _attempts_ended(folder)
            if not attempts_ended:
                self._write_provenance(folder)
            # A job that was killed between its last save and the validation after it would never validate.
            elif all(attempts_ended) and (last := saved_checkpoints(folder).get(self.steps)):
                shutil.rmtree(last)
        folders = [["--job.dump_folder", str(self.out / run.folder)] for run in runs]
        # The batch script names the configuration itself.
        lines = [shlex.join([*self.arguments(run)[2:], *folder]) for run, folder in zip(runs, folders, strict=True)]
        text = "".join(f"{line}\n" for line in lines)
        file = self.out / f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        atomic_write(file, text)
        settings = [f"SWEEP={file}", f"CONFIG_FILE={Path(config).absolute()}", f"RANKS={self.ranks}"]
        settings += ["TITAN_ADAM_MINI_SAME_VALIDATION=1"]
        settings += [f"TRAIN_FILE={module}"] if (module := os.environ.get("TRAIN_FILE")) else []
        settings += ["NGPU=1"] if self.ranks == 1 else []  # whatever GPUs a node has
        nodes, text = "1", f"Submit the {len(runs)} runs:"
        if self.ranks > 1:
            nodes, text = "NODES", f"Submit the {len(runs)} runs, with as many NODES as make {self.ranks} ranks:"
        return f"{text}\n{shlex.join(settings)} sbatch -N {nodes} --array=0-{len(runs) - 1} launch/slurm/sweep.sbatch"

    def run_all(self, console: Console, after_run: Callable[[], object]) -> list[str]:
        """Do runs until none remain.

        Args:
            console: for progress.
            after_run: called after every run.

        Returns:
            The failures, a sentence each. No further runs of a variant are started after one has failed.
        """
        free = list(self.variables)
        trainings: dict[Run, Training] = {}
        in_use: dict[Run, dict[str, str]] = {}
        failures: dict[str, list[str]] = {}
        progress = _ProgressDisplay(console, self.steps)
        adopted = self._running_trainers()
        try:
            with progress:
                for run, variables in adopted.items():  # they have their GPUs already
                    trainings[run] = self._start(run, variables)
                    if variables in free:
                        in_use[run] = free.pop(free.index(variables))
                    progress.started(run, trainings[run])
                while (waiting := self._waiting(trainings, failures)) or trainings:
                    while free and waiting:
                        run = waiting.pop(0)
                        try:
                            self.make_initial_checkpoint(run.seed)
                        except ValueError as error:  # all variants need it
                            failures |= {name: [*failures.get(name, []), str(error)] for name in self.variants}
                            break
                        in_use[run] = free.pop(0)
                        trainings[run] = self._start(run, in_use[run])
                        progress.started(run, trainings[run])
                    time.sleep(_POLL if trainings else 0)
                    for run, training in list(trainings.items()):
                        running = training.running()
                        if running and training.diverged:
                            training.stop()
                        elif running:
                            progress.running(run, training)
                            continue
                        training.close()
                        del trainings[run]
                        if run in in_use:
                            free.append(in_use.pop(run))
                        finished = self._finish(run)
                        failure = ""
                        if not finished and not training.adopted:
                            failure = training.failure or (
                                f"it ended at step {training.step} of {self.steps}: out of data?"
                            )
                            failures.setdefault(run.variant, []).append(f"the run {run} failed: {failure}")
                        progress.ended(run, training, self.records.get(run), failure)
                        after_run()
                    progress.total(self.plan.expected(self.losses()), len(self.remaining()), trainings.values())
        finally:
            for training in trainings.values():
                training.request_stop()
            for training in trainings.values():
                training.stop()
        return list(dict.fromkeys(chain(*failures.values())))

    def _waiting(self, trainings: Mapping[Run, Training], failures: Mapping[str, list[str]]) -> list[Run]:
        return [run for run in self.remaining() if run not in trainings and run.variant not in failures]

    def _running_trainers(self) -> dict[Run, dict[str, str]]:
        """The runs that have a running trainer of an earlier command -> its environment variables."""
        runs = {self.out / run.folder: run for run in self.remaining()}
        found: dict[Run, dict[str, str]] = {}
        for lock in self.out.glob(f"runs/*/*/*/{LOCK}"):
            if trainer := running_trainer(lock.parent):
                pid, variables = trainer
                if lock.parent not in runs:
                    raise ValueError(
                        f"a trainer of an earlier command is running in {lock.parent}, which is not a run of this "
                        f"command: wait for it, or stop it with kill {pid}"
                    )
                found[runs[lock.parent]] = variables
        return found

    def _start(self, run: Run, variables: Mapping[str, str]) -> Training:
        folder = self.out / run.folder
        training = Training(
            folder,
            self.arguments(run),
            ranks=self.ranks,
            loss_rank=self.loss_ranks[run.variant],
            variables=variables,
            recorded_steps=read(folder / TENSORBOARD, run, self.ranks).complete_steps(self.validation_freq)
            if self.saves
            else 0,
        )
        if not training.adopted:
            self._write_provenance(folder)
        return training

    def _write_provenance(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / PROVENANCE, json.dumps(self.provenance))

    def _finish(self, run: Run) -> bool:
        """If a run is finished, write its record and remove its checkpoints but the last; returns whether it is."""
        folder = self.out / run.folder
        record = read(folder / TENSORBOARD, run, self.ranks)
        # A job that was killed between a save and the validation after it lacks that validation.
        if record.diverged is None and (record.steps < self.steps or self.steps not in record.validation):
            return False
        lines = [f"{step} {loss}\n" for step, loss in enumerate(record.losses, 1)]
        atomic_write(folder / LOSSES, "".join(lines))
        provenance = folder / PROVENANCE
        record.made = json.loads(provenance.read_text()) if provenance.is_file() else {}
        record.write(folder / RECORD)
        self.records[run] = record
        for step, checkpoint in saved_checkpoints(folder).items():
            if step < self.steps:
                shutil.rmtree(checkpoint)
        return True

    def losses(self) -> dict[Run, float]:
        """Finished run -> its last validation loss, infinite if it diverged."""
        return {run: record.final for run, record in self.records.items()}


def _attempts_ended(folder: Path) -> list[bool]:
    """For each attempt of launch/slurm at a run, whether it is known to have ended."""
    return [json.loads(file.read_text())["ended"] is not None for file in folder.glob("attempts/*/begun.json")]


def seeded(arguments: list[str], seed: int) -> list[str]:
    """A command line with `{seed}`, such as in the path of a data set, replaced by the seed."""
    return [word.replace("{seed}", str(seed)) for word in arguments]


class _ProgressDisplay:
    """Progress: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._all: TaskID | None = None
        self._tasks: dict[Run, TaskID] = {}
        self._last_line: dict[Run, float] = {}

    def __enter__(self) -> _ProgressDisplay:
        self._bars.start()
        self._all = self._bars.add_task("all steps", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, run: Run, training: Training) -> None:
        self._tasks[run] = self._bars.add_task(str(run), total=self._steps)
        self._last_line[run] = time.monotonic()
        if training.adopted:
            self._print(f"{run}: still running since an earlier command; waiting for it")
        elif training.resumed_step:
            self._print(f"{run}: resumes from the checkpoint of step {training.resumed_step}")
        elif not self._console.is_terminal:
            self._print(f"{run}: started")

    def running(self, run: Run, training: Training) -> None:
        description = f"{run}: loss {training.loss}" if training.loss else str(run)
        self._bars.update(self._tasks[run], completed=training.step, description=description)
        if not self._console.is_terminal and time.monotonic() >= self._last_line[run] + _LOG_INTERVAL:
            self._last_line[run] = time.monotonic()
            self._print(f"{run}: step {training.step} of {self._steps}, loss {training.loss or 'not known yet'}")

    def ended(self, run: Run, training: Training, record: Record | None, failure: str) -> None:
        self._bars.remove_task(self._tasks.pop(run))
        if failure:
            self._print(f"{run}: failed: {failure}; no more runs of {run.variant}")
        elif record is None:
            self._print(f"{run}: ended at step {training.step}")
        elif record.diverged is not None:
            self._print(f"{run}: diverged at step {record.diverged}")
        else:
            self._print(f"{run}: validation loss {record.final:.4f} after step {record.steps}")

    def total(self, expected: int, remaining: int, trainings: Collection[Training]) -> None:
        done = expected - remaining
        steps = done * self._steps + sum(training.step for training in trainings)
        if self._all is not None:
            description = f"{done} of {expected} runs"
            self._bars.update(self._all, completed=steps, total=expected * self._steps, description=description)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
