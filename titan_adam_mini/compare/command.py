"""The command `compare`."""

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
from ..tools.versions import device_name, provenance
from .folder import check_settings, locked
from .plan import Plan
from .report import Report
from .variants import Variant, conflicts, parse, settings_of, trainer_arguments

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .configurations import Compared


@dataclass
class Compare:
    """Train with AdamW and AdamMini from the same weights on the same data, and report whether their losses differ.

    torchtitan's own trainer does the training, with the configured validation. A run is a variant at a learning rate
    with a seed. An interrupted command resumes when it is given again: finished runs are not repeated, and runs with
    --checkpoint.enable resume from their checkpoints. Takes any torchtitan --section.key value as well, for all
    variants; the configuration may also be given as --job.config_file X or CONFIG_FILE=X.
    """

    config: ConfigFile
    """torchtitan's configuration, with a [validation] section."""

    optimizers: str = "AdamW,AdamMini"
    """The optimizers to compare, with the configuration's settings; the others are compared with the first."""

    variant: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another variant with its own settings, in quotes: "NAME=OPTIMIZER --section.key value ...", such as
    "tensor=AdamMini --optimizer.adam_mini.value_blocks tensor". May be given several times."""

    seeds: int = 3
    """Number of seeds: 0, 1, ... A seed gives the initial weights and replaces {seed} in torchtitan's values: with
    --training.dataset_path data/order-{seed} it gives the order of the data too."""

    lr: str = ""
    """Learning rates to try with the first seed, such as 1e-3,2e-3; the other seeds run at each variant's best. While
    the best is at an edge of the list, the list is extended. Without this flag, the configuration's learning rate."""

    out: Path | None = None
    """Folder of the runs and the report; outputs/compare/NAME for NAME.toml."""

    ngpu: int | None = None
    """Number of ranks of a run; NGPU, or one, if not given."""

    jobs: int = 1
    """Number of runs at once, each with its own GPUs; on a CPU every rank has one core, or OMP_NUM_THREADS of them."""

    slurm: bool = False
    """Train nothing here: write the initial checkpoints (on one rank) and a file of the runs to do next for
    launch/slurm/sweep.sbatch, print the command that submits them, and report the finished runs. Give the same command
    again when the array has finished: it reports its runs and writes the next ones. The runs save checkpoints, to
    survive pre-emption."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        variants, lrs, ranks = self._checked()
        from .runner import Runner

        common_arguments = trainer_arguments(self.config, arguments)
        compared = _configurations(variants, common_arguments, ranks)
        settings = {name: settings_of(variant.config, variant.data_ranks) for name, variant in compared.items()}
        if found := conflicts(settings):
            raise ValueError(f"the variants cannot be compared: {'; '.join(found)}")
        first = next(iter(compared.values())).config
        _check_validation(first)
        _check_data(first, self.seeds)
        own_initial_checkpoint = _has_initial_checkpoint(common_arguments, first, self.seeds)
        devices = [{}] if self.slurm else _devices(ranks, self.jobs)
        require_matplotlib()  # now, and not after days of training
        common = {"ranks": ranks, "threads": int(os.environ.get("OMP_NUM_THREADS") or 1), "slurm": self.slurm}
        out = (self.out or Path("outputs/compare") / Path(self.config).stem).absolute()

        def print_line(line: str) -> None:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

        with locked(out), _signals():
            common = check_settings(out, settings, common)
            plan = Plan(
                {name: variant.config["optimizer"]["lr"] for name, variant in compared.items()}, lrs, self.seeds
            )
            checkpoint = first["checkpoint"]
            runner = Runner(
                out=out,
                plan=plan,
                variants={variant.name: [*common_arguments, *variant.arguments] for variant in variants},
                ranks=ranks,
                loss_ranks={name: variant.loss_rank for name, variant in compared.items()},
                steps=first["training"]["steps"],
                validation_freq=first["validation"]["freq"],
                saves=(checkpoint["enable"] or self.slurm) and not checkpoint["load_only"],
                own_initial_checkpoint=own_initial_checkpoint,
                variables=[{"OMP_NUM_THREADS": str(common["threads"]), **device} for device in devices],
                provenance=provenance("nodes of Slurm" if self.slurm else device_name(_device(), common["threads"])),
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
            runner.collect()
            failures = []
            if self.slurm:
                if line := runner.write_slurm_sweep(self.config):
                    print_line(line)
            else:
                if cores := _cores_if_oversubscribed(ranks * self.jobs * common["threads"]):
                    print_line(
                        f"{self.jobs} runs of {ranks} x {common['threads']} threads at once share {cores} cores."
                    )
                failures = runner.run_all(console, lambda: report.write(runner.records, pictures=False))
            for line in report.write(runner.records):
                print_line(line)
            print_line(f"Written: {out / 'report.md'}")
        if failures:
            raise ValueError("; ".join(failures))

    def _checked(self) -> tuple[list[Variant], list[float], int]:
        """Variants, learning rates and ranks; raises ValueError for invalid flags."""
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
        for variant in variants:
            if lrs and any(flag.partition("=")[0] == "--optimizer.lr" for flag in variant.flags):
                raise ValueError(
                    f"the variant {variant.name} sets --optimizer.lr, and --lr is given too: use one of them"
                )
        return variants, lrs, ranks_of_a_run(self.ngpu)

    def _command(self, arguments: list[str]) -> str:
        """The command line, with settings that came from the environment."""
        words = ["titan-adam-mini", "compare", self.config]
        for name in ("optimizers", "seeds", "lr", "out", "ngpu", "jobs"):
            if (value := getattr(self, name)) != getattr(Compare, name):
                words += [f"--{name}", str(value)]
        words += ["--slurm"] * self.slurm
        for variant in self.variant:
            words += ["--variant", variant]
        return shlex.join([*words, *arguments[2:]])


def _configurations(variants: list[Variant], arguments: list[str], ranks: int) -> dict[str, Compared]:
    """Name -> torchtitan's configuration of a variant; raises ValueError if torchtitan refuses its arguments."""
    with isolated_process() as call:
        return {variant.name: call(_read, [*arguments, *variant.arguments], ranks) for variant in variants}


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
            f"validation.seq_len is {validation['seq_len']}, but the model is built for training.seq_len, "
            f"{training['seq_len']}: give --validation.seq_len {training['seq_len']}"
        )


def _check_data(config: dict[str, Any], seeds: int) -> None:
    """Raise ValueError if the data of seed 0 is a local path and that of another seed is missing."""
    from .runner import seeded

    for section in ("training", "validation"):
        path = config[section]["dataset_path"] or ""
        paths = [Path(seeded([path], seed)[0]) for seed in range(seeds)]
        missing = [str(path) for path in paths if not path.exists()]
        if path and paths[0].exists() and missing:
            raise ValueError(
                f"{section}.dataset_path {path} is missing for some of the {seeds} seeds: {', '.join(missing)}"
            )


def _has_initial_checkpoint(arguments: list[str], config: dict[str, Any], seeds: int) -> bool:
    """Whether the configuration itself names the checkpoint that runs start from."""
    checkpoint = config["checkpoint"]
    if not checkpoint["enable"] or not (checkpoint["initial_load_path"] or checkpoint["initial_load_in_hf"]):
        return False
    if not checkpoint["initial_load_model_only"]:
        raise ValueError(
            "runs are compared from step 1 on, with new optimizer state: leave checkpoint.initial_load_model_only true"
        )
    if seeds > 1 and not any("{seed}" in argument for argument in arguments):
        raise ValueError(
            "all seeds would start from the checkpoint that the configuration names, and read the same data: give "
            "--seeds 1, or other data per seed with {seed} in --training.dataset_path"
        )
    return True


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cores_if_oversubscribed(threads: int) -> int:
    """The number of cores, if trainers on a CPU have more threads than that; else 0."""
    cores = len(os.sched_getaffinity(0))
    return cores if _device().type == "cpu" and threads > cores else 0


def _devices(ranks: int, jobs: int) -> list[dict[str, str]]:
    """For each of the concurrent runs, the environment variable that gives it its GPUs; none without GPUs."""
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
    """A context in which SIGTERM and SIGHUP raise KeyboardInterrupt, which stops the runs."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGHUP stays ignored under nohup.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
