"""The command `compare`: its flags, refusals, and the order of what is done."""

from __future__ import annotations

import math
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..tools.figures import require_matplotlib
from ..tools.flags import ConfigFile, check_config, ranks_of_a_run
from ..tools.isolated_process import isolated_process
from ..tools.versions import device_name, made_with
from .plan import Plan
from .report import Report
from .settled import alone, settle
from .variants import Variant, parse, settings_of, trainer_words, unlike

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .configurations import Compared


@dataclass
class Compare:
    """Train with AdamW and AdamMini from equal starts on equal data, and report whether their losses differ.

    torchtitan's own trainer does the training, with the validation that the configuration asks for. Every run, a
    variant at a learning rate with a seed, is done once: a command that was stopped, however, goes on where it was;
    runs with --checkpoint.enable go on from their checkpoints. Takes any of torchtitan's --section.key value besides,
    for all variants; the configuration may also be given as --job.config_file X or CONFIG_FILE=X.
    """

    config: ConfigFile
    """torchtitan's configuration, with [validation] in it."""

    optimizers: str = "AdamW,AdamMini"
    """What is compared, with the configuration's settings; the first is what the others are held against."""

    variant: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """One more, with settings of its own, in quotes: "NAME=OPTIMIZER --section.key value ...", such as "tensor=AdamMini
    --optimizer.adam_mini.value_blocks tensor". May be given several times."""

    seeds: int = 3
    """How many seeds: 0, 1, ... A seed gives the initial weights, and stands for {seed} in torchtitan's values: with
    --training.dataset_path data/order-{seed} it gives the order of the data too."""

    lr: str = ""
    """Learning rates to try with the first seed, such as 1e-3,2e-3: the others are run at each variant's best. While
    that is at an edge of the list, the list is extended. Without it, the configuration's."""

    out: Path | None = None
    """Folder of the runs and the report; outputs/compare/NAME for NAME.toml."""

    ngpu: int | None = None
    """Number of ranks of a run; NGPU, or one, if not given."""

    jobs: int = 1
    """So many runs at once, each with its own GPUs; on a CPU every rank has one core, or OMP_NUM_THREADS of them."""

    slurm: bool = False
    """Train nothing here but make the starts, on one rank: write the runs that are wanted now into a file for
    launch/slurm/sweep.sbatch, print the line that submits them, and report what is there. Once the array has finished,
    the same command reports its runs and writes the next ones. The runs keep checkpoints, to survive pre-emption."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        variants, lrs, ranks = self._checked()
        from .work import Work

        words = trainer_words(self.config, arguments)
        compared = _configurations(variants, words, ranks)
        settings = {name: settings_of(one.config, one.data_ranks) for name, one in compared.items()}
        if told := unlike(settings):
            raise ValueError(f"the variants cannot be compared: {'; '.join(told)}")
        first = next(iter(compared.values())).config
        _check_validation(first)
        _check_data(first, self.seeds)
        own_start = _check_start(words, first, self.seeds)
        devices = [{}] if self.slurm else _devices(ranks, self.jobs)
        require_matplotlib()  # before, and not after, days of training
        common = {"ranks": ranks, "threads": int(os.environ.get("OMP_NUM_THREADS") or 1), "slurm": self.slurm}
        out = (self.out or Path("outputs/compare") / Path(self.config).stem).absolute()

        def say(line: str) -> None:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

        with alone(out), _signals():
            common = settle(out, settings, common)
            plan = Plan({name: one.config["optimizer"]["lr"] for name, one in compared.items()}, lrs, self.seeds)
            checkpoint = first["checkpoint"]
            work = Work(
                out=out,
                plan=plan,
                variants={one.name: [*words, *one.arguments] for one in variants},
                ranks=ranks,
                shown={name: one.shown for name, one in compared.items()},
                steps=first["training"]["steps"],
                frequency=first["validation"]["freq"],
                saves=(checkpoint["enable"] or self.slurm) and not checkpoint["load_only"],
                own_start=own_start,
                variables=[{"OMP_NUM_THREADS": str(common["threads"]), **one} for one in devices],
                made=made_with("nodes of Slurm" if self.slurm else device_name(_device(), common["threads"])),
            )
            report = Report(
                out=out,
                command=self._command(arguments),
                config=self.config,
                plan=plan,
                variants=variants,
                compared=compared,
                ranks=ranks,
            )
            work.collect()
            failed = []
            if self.slurm:
                if line := work.hand_over(self.config):
                    say(line)
            else:
                if cores := _crowded(ranks * self.jobs * common["threads"]):
                    say(f"{self.jobs} runs of {ranks} x {common['threads']} threads at once share {cores} cores.")
                failed = work.do(console, lambda: report.write(work.records, pictures=False))
            for line in report.write(work.records):
                say(line)
            say(f"Written: {out / 'report.md'}")
        if failed:
            raise ValueError("; ".join(failed))

    def _checked(self) -> tuple[list[Variant], list[float], int]:
        """Variants, learning rates and ranks; ValueError for flags that cannot be served."""
        check_config(self.config)
        variants = parse(self.optimizers, self.variant)
        if self.seeds < 1:
            raise ValueError(f"--seeds must be 1 or more, not {self.seeds}")
        if self.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, not {self.jobs}")
        lrs = []
        for word in filter(None, self.lr.split(",")):
            try:
                lrs.append(float(word))
            except ValueError:
                lrs.append(math.nan)
            if not 0 < lrs[-1] < math.inf:
                raise ValueError(f"--lr takes learning rates such as 1e-3,2e-3, not {word!r}")
        for one in variants:
            if lrs and any(word.partition("=")[0] == "--optimizer.lr" for word in one.words):
                raise ValueError(f"the variant {one.name} has an --optimizer.lr of its own, and --lr is given: use one")
        return variants, lrs, ranks_of_a_run(self.ngpu)

    def _command(self, arguments: list[str]) -> str:
        """The command that was given, whichever way its parts came in."""
        words = ["titan-adam-mini", "compare", self.config]
        for name in ("optimizers", "seeds", "lr", "out", "ngpu", "jobs"):
            if (value := getattr(self, name)) != getattr(Compare, name):
                words += [f"--{name}", str(value)]
        words += ["--slurm"] * self.slurm
        for one in self.variant:
            words += ["--variant", one]
        return shlex.join([*words, *arguments[2:]])


def _configurations(variants: list[Variant], words: list[str], ranks: int) -> dict[str, Compared]:
    """Name -> what torchtitan makes of a variant's words; ValueError if it does not take them."""
    with isolated_process() as call:
        return {one.name: call(_read, [*words, *one.arguments], ranks) for one in variants}


def _read(*args: Any) -> Any:
    from .configurations import read_compared

    return read_compared(*args)


def _check_validation(config: dict[str, Any]) -> None:
    validation, training = config["validation"], config["training"]
    if not validation["enable"]:
        raise ValueError(
            "there is no validation set: set [validation] enable, dataset, dataset_path, freq and steps, or give "
            "--validation.enable and the others"
        )
    if validation["freq"] < 1 or training["steps"] % validation["freq"]:
        raise ValueError(
            f"the last of {training['steps']} steps would not be validated: choose a --validation.freq that divides "
            f"it, not {validation['freq']}"
        )
    if validation["seq_len"] > training["seq_len"]:
        raise ValueError(
            f"validation.seq_len is {validation['seq_len']}, and the model is built for training.seq_len, "
            f"{training['seq_len']}: give --validation.seq_len {training['seq_len']}"
        )


def _check_data(config: dict[str, Any], seeds: int) -> None:
    """Whether the data of all seeds are there, where those of seed 0 are a local path."""
    from .work import seeded

    for section in ("training", "validation"):
        path = config[section]["dataset_path"] or ""
        of_seed = [Path(one) for seed in range(seeds) for one in seeded([path], seed)]
        missing = [str(one) for one in of_seed if not one.exists()]
        if path and of_seed[0].exists() and missing:
            raise ValueError(
                f"{section}.dataset_path {path} is missing for some of the {seeds} seeds: {', '.join(missing)}"
            )


def _check_start(words: list[str], config: dict[str, Any], seeds: int) -> bool:
    """Whether the configuration itself says which checkpoint runs start from."""
    checkpoint = config["checkpoint"]
    if not checkpoint["enable"] or not (checkpoint["initial_load_path"] or checkpoint["initial_load_in_hf"]):
        return False
    if not checkpoint["initial_load_model_only"]:
        raise ValueError(
            "runs are compared from step 1 on, with new optimizer state: leave checkpoint.initial_load_model_only true"
        )
    if seeds > 1 and not any("{seed}" in word for word in words):
        raise ValueError(
            "all seeds would start from the checkpoint that the configuration names, and read the same data: give "
            "--seeds 1, or data of their own with {seed} in --training.dataset_path"
        )
    return True


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _crowded(threads: int) -> int:
    """The number of cores, where so many threads of trainers on a CPU are more; else 0."""
    cores = len(os.sched_getaffinity(0))
    return cores if _device().type == "cpu" and threads > cores else 0


def _devices(ranks: int, jobs: int) -> list[dict[str, str]]:
    """For each of the runs at once: the variable that shows it its GPUs; none without GPUs."""
    import torch

    if not torch.cuda.is_available():
        return [{} for _ in range(jobs)]
    count = torch.cuda.device_count()
    if ranks * jobs > count:
        raise ValueError(f"{jobs} runs of {ranks} ranks at once need {ranks * jobs} GPUs, and there are {count}")
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(
        map(str, range(count))
    )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[job * ranks :][:ranks])} for job in range(jobs)]


@contextmanager
def _signals() -> Iterator[None]:
    """While it lasts a TERM or HUP unwinds as an interrupt does, which ends the runs."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # nohup has HUP ignored, and stays in force.
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, leave) for one in heard}
    try:
        yield
    finally:
        for one, former in before.items():
            signal.signal(one, former)
