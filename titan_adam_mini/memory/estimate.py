"""The command `estimate`: the peak of a training step by category, AdamW beside AdamMini, and what fits a budget."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..child import Child, child, in_child
from ..flags import STDOUT, ConfigFile, JsonFile, check_config, check_file, write_json
from ..momentum import TYPES
from .fit import BATCH, GPUS, LIMITS, SEQUENCE, Found, fewest, largest
from .picture import CATEGORIES, GIB, stacked_bars

if TYPE_CHECKING:
    from .simulate import Simulated

PAIR = ("AdamW", "AdamMini")
MOMENTA = tuple(f"AdamMini {name}" for name in TYPES)
MODES = ("none", "selective", "full")
"""Activation checkpointing that `--fit` tries; "selective" with the configuration's option."""
CAVEAT = (
    "Simulated, not measured: eager (torch.compile usually needs less), without the allocator's fragmentation, the "
    "CUDA context and NCCL. Compared with one GPU for one model (docs/memory.md); not validated on a GPU otherwise."
)


@dataclass
class Estimate:
    """Simulate the peak memory of a training step by category, AdamW beside AdamMini, without hardware.

    Takes any of torchtitan's --section.key value besides; the configuration may also be given as --job.config_file X
    or CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: str = ""
    """Numbers of ranks, such as 8,64,512."""

    rank: int | None = None
    """The rank to simulate; the first of every pipeline stage if not given, of which the largest is shown."""

    fit: str = ""
    """Memory of a GPU, such as 80GiB: find the largest local batch, the longest sequence and the fewest GPUs that fit
    with AdamW and with AdamMini, for each mode of activation checkpointing."""

    reserve: str = "6GiB"
    """What --fit leaves free for the CUDA context, NCCL and fragmentation."""

    vary: str = ",".join(LIMITS)
    """What --fit looks for."""

    json: JsonFile = None
    """JSON in place of the tables, every size in bytes; into a file, if one is named, beside them."""

    plot: Path | None = None
    """A picture: stacked bars of AdamW and AdamMini for every number of ranks."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        numbers, room = self._checked()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress, child() as call:
            runs = []
            for ngpu in numbers:
                task = progress.add_task(f"simulating {ngpu:,} ranks", total=None)
                runs.append(_largest(call, _simulate_checked, arguments, ngpu, self.rank, (*PAIR, *MOMENTA)))
                progress.remove_task(task)
            fits = self._fits(runs[-1], arguments, room, progress) if room else []
        if self.plot:
            draw(self.plot, runs, parse_bytes(self.fit, "--fit") if self.fit else None)
        if self.json:
            facts = {"torch": torch.__version__, "config": self.config, "caveat": CAVEAT}
            write_json(
                self.json, {**facts, "runs": [_as_json(run) for run in runs], "fit": [asdict(one) for one in fits]}
            )
        if self.json == STDOUT:
            return
        if not console.is_terminal:
            console = Console(file=console.file, width=160)
        for run in runs:
            _show(console, run)
        if room:
            _show_fits(console, runs[-1], fits, self.fit, self.reserve)
        console.print(CAVEAT, soft_wrap=True, highlight=False)

    def _checked(self) -> tuple[list[int], int | None]:
        """Numbers of ranks, and bytes that may be filled; ValueError for flags that cannot be served."""
        check_config(self.config)
        given = self.ngpu or os.environ.get("NGPU", "")
        words = [word.strip() for word in given.split(",") if word.strip()]
        if not words:
            raise ValueError("the number of ranks is not known: give --ngpu N or --ngpu N,N,..., or set NGPU=N")
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--ngpu {given}: numbers of ranks are positive, with commas between them")
        check_file("--json", self.json)
        check_file("--plot", self.plot)
        if unknown := [one for one in self._varied() if one not in LIMITS]:
            raise ValueError(f"--vary {', '.join(unknown)}: it takes {', '.join(LIMITS)}, with commas between them")
        if not self.fit:
            return [int(word) for word in words], None
        if len(words) > 1:
            raise ValueError(f"--fit looks at one number of ranks and from there at others: give one, not {given}")
        room = parse_bytes(self.fit, "--fit") - parse_bytes(self.reserve, "--reserve")
        if room <= 0:
            raise ValueError(f"--reserve {self.reserve} leaves nothing of --fit {self.fit}")
        return [int(word) for word in words], room

    def _varied(self) -> list[str]:
        return [word.strip() for word in self.vary.split(",")]

    def _fits(self, run: Simulated, arguments: list[str], room: int, progress: Progress) -> list[Fit]:
        """The answers for every mode of checkpointing, each searched in a process of its own."""
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(len(MODES)))
            searches = [
                _Search(stack.enter_context(child()), run, arguments, mode, room, self.rank, progress) for mode in MODES
            ]
            found = list(threads.map(lambda search: [search.answer(what) for what in self._varied()], searches))
        return [fit for fits in found for answers in fits for fit in answers]


@dataclass(frozen=True)
class Fit:
    """One answer of `--fit`.

    Attributes:
        question: "local batch", "sequence" or "GPUs".
        checkpointing: mode of activation checkpointing.
        optimizer: "AdamW" or "AdamMini".
        found: the answer.
    """

    question: str
    checkpointing: str
    optimizer: str
    found: Found


@dataclass
class _Search:
    """Simulations with one mode of checkpointing; none is made twice."""

    call: Child
    run: Simulated
    arguments: list[str]
    mode: str
    room: int
    rank: int | None
    progress: Progress
    seen: dict[tuple[str, int], Simulated] = field(default_factory=dict)

    def answer(self, question: str) -> list[Fit]:
        """The answers for both optimizers."""
        mesh = self.run.mesh
        others = math.prod(degree for axis, degree in mesh.items() if axis not in ("dp_shard", "etp"))
        unit = {
            BATCH: self.run.batch_unit,
            SEQUENCE: math.lcm(self.run.seq_divisor, 1024 if self.run.seq_len >= 2048 else 128),
            GPUS: others,
        }
        start = {BATCH: self.run.batch, SEQUENCE: self.run.seq_len, GPUS: self.run.ngpu}
        search = fewest if question == GPUS else largest
        return [
            Fit(
                question,
                self.mode,
                name,
                search(self._peak(question, name), self.room, unit[question], start[question], LIMITS[question]),
            )
            for name in PAIR
        ]

    def _peak(self, question: str, name: str) -> Callable[[int], int]:
        return lambda value: self._simulated(question, value).peak(name).total

    def _simulated(self, question: str, value: int) -> Simulated:
        if (question, value) not in self.seen:
            flags = ["--activation_checkpoint.mode", self.mode, "--training.global_batch_size", "-1"]
            ngpu = self.run.ngpu
            if question == BATCH:
                flags += ["--training.local_batch_size", str(value)]
            elif question == SEQUENCE:
                flags += ["--training.seq_len", str(value)]
            else:
                flags += ["--parallelism.data_parallel_shard_degree", "-1"]
                ngpu = value
            task = self.progress.add_task(f"checkpointing {self.mode}: {question} {value:,}", total=None)
            arguments = [*self.arguments, *flags]
            run = _largest(self.call, _simulate, arguments, ngpu, self.rank, PAIR, self.run.passes)
            self.seen[question, value] = run
            self.progress.remove_task(task)
        return self.seen[question, value]


def _simulate_checked(*args: Any) -> Any:
    _quiet()
    from .agree import simulate_checked

    return simulate_checked(*args)


def _simulate(*args: Any) -> Any:
    _quiet()
    from .simulate import simulate

    return simulate(*args)


def _quiet() -> None:
    # torchtitan tells about every model that it builds, and this builds dozens.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _largest(call: Child, simulate: Any, arguments: list[str], ngpu: int, rank: int | None, *more: Any) -> Simulated:
    """A simulation of one rank, or, if `rank` is None, that of the pipeline stage whose first rank holds most.

    Stages but the first have a process each: torch keeps what it derives from a mesh, and would give one rank another's
    place on it.
    """
    first = call(simulate, arguments, ngpu, rank or 0, *more)
    stages = first.mesh.get("pp", 1) if rank is None else 1
    ranks = [stage * ngpu // stages for stage in range(1, stages)]
    others = [in_child(simulate, arguments, ngpu, one, *more) for one in ranks]
    return max([first, *others], key=lambda run: run.peak(PAIR[0]).total)


def parse_bytes(text: str, flag: str) -> int:
    """Bytes from words such as 80GiB, 80GB, 512MiB."""
    units = {"B": 1, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": GIB, "TB": 10**12, "TiB": 1 << 40}
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?i?B)", text.strip())
    try:
        return int(float(found[1]) * units[found[2]])  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{flag} {text!r} is no amount of memory: write it as 80GiB, with {', '.join(units)}"
        ) from None


# What is shown


def _show(console: Console, run: Simulated) -> None:
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in run.mesh.items()) or "not sharded"
    passes = f" in each of {run.passes} passes" if run.passes > 1 else ""
    console.print(
        f"{run.model}, {run.ngpu:,} ranks ({mesh}), rank {run.rank}: local batch {run.batch}{passes}, sequence "
        f"{run.seq_len:,}, parameters {run.dtypes[0]}, computation {run.dtypes[1]}, activation checkpointing "
        f"{run.checkpointing}",
        soft_wrap=True,
        highlight=False,
    )
    names = [name for name in run.peaks if name != "AdamMini"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GiB at the peak")
    for name in names:
        table.add_column(name + (" *" if name == run.configured else ""), justify="right")
    peaks = [run.peak(name) for name in names]
    for category in CATEGORIES:
        sizes = [peak.held.get(category, 0) for peak in peaks]
        if any(sizes):
            table.add_row(category, *(_gib(size) for size in sizes))
    table.add_section()
    table.add_row("total", *(_gib(peak.total) for peak in peaks), style="bold")
    table.add_row("reached in", *(peak.phase for peak in peaks))
    lower = [min(run.peaks[name], key=lambda peak: peak.total) for name in names]
    table.add_row("the other phase", *(_gib(peak.total) for peak in lower))
    console.print(table)
    console.print(
        f"* as configured. {'; '.join(f'{name}: {why}' for name, why in run.refused.items())}", soft_wrap=True
    )


def _show_fits(console: Console, run: Simulated, fits: Sequence[Fit], budget: str, reserve: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"What fits {budget}, {reserve} of it left free")
    for heading in ("", "activation checkpointing", *PAIR):
        table.add_column(heading, justify="right" if heading in PAIR else "left")
    asked = {BATCH: "largest local batch", SEQUENCE: "longest sequence", GPUS: "fewest GPUs"}
    for question in dict.fromkeys(fit.question for fit in fits):
        for mode in MODES:
            pair = [_answer(fit) for fit in fits if (fit.question, fit.checkpointing) == (question, mode)]
            table.add_row(asked[question], mode, *pair)
        table.add_section()
    console.print(table)
    console.print(
        f"Each with the other two as configured: {run.ngpu:,} GPUs, local batch {run.batch}, sequence {run.seq_len:,}. "
        "In brackets the peak there, and one step beyond, where it does not fit.",
        soft_wrap=True,
        highlight=False,
    )


def _answer(fit: Fit) -> str:
    found, limit = fit.found, LIMITS[fit.question]
    if found.value is None:
        return f"none up to {limit:,}" if fit.question == GPUS else "not even the smallest"
    shown = " | ".join(_gib(size) for size in (found.peak, found.beyond) if size is not None)
    return f"{found.value:,} ({shown} GiB)"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _as_json(run: Simulated) -> dict[str, Any]:
    """Everything about one run; sizes are bytes."""
    facts = {key: value for key, value in asdict(run).items() if key != "peaks"}
    facts["optimizers"] = {}
    for name, phases in run.peaks.items():
        peak = run.peak(name)
        told = {"peak_bytes": peak.total, "phase": peak.phase, "phases": [asdict(one) for one in phases]}
        facts["optimizers"][name] = told
    return facts


def draw(path: Path, runs: Sequence[Simulated], budget: int | None) -> None:
    """AdamW and AdamMini side by side, for every run."""
    bars = [(f"{run.ngpu:,} GPU{'s' * (run.ngpu > 1)}\n{name}", run.peak(name).held) for run in runs for name in PAIR]
    first = runs[0]
    title = f"{first.model}: simulated peak of a training step on one GPU"
    momentum = first.configured.split()[1]
    note = (
        f"Local batch {first.batch}, sequence {first.seq_len:,}, parameters {first.dtypes[0]}, computation "
        f"{first.dtypes[1]}, activation checkpointing {first.checkpointing}; AdamMini with {momentum} momentum. "
        f"{CAVEAT}"
    )
    stacked_bars(path, title, bars, budget=budget, note=note)
