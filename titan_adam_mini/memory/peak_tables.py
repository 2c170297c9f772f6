"""Simulated peaks as tables, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .fit import BATCH, GPUS, LIMITS, SEQUENCE
from .peaks import MODES, PAIR, Fit
from .picture import CATEGORIES, GIB, stacked_bars

if TYPE_CHECKING:
    from .simulate import Simulated

WIDTH = 160
CAVEAT = (
    "Simulated, not measured: eager (torch.compile usually needs less), without the allocator's fragmentation, the "
    "CUDA context and NCCL. Compared with one GPU for one model (docs/memory.md); not validated on a GPU otherwise."
)


def show(console: Console, runs: Sequence[Simulated], fits: Sequence[Fit], budget: str, reserve: str) -> None:
    """Print every run, and what fits the budget of the last one; `budget` is "" if nothing was searched."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    for run in runs:
        _show(console, run)
    if budget:
        _show_fits(console, runs[-1], fits, budget, reserve)
    console.print(CAVEAT, soft_wrap=True, highlight=False)


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
    table.add_row("peak of the other phase", *(_gib(peak.total) for peak in lower))
    console.print(table)
    console.print(
        f"* as configured. {'; '.join(f'{name}: {why}' for name, why in run.refused.items())}", soft_wrap=True
    )


def _show_fits(console: Console, run: Simulated, fits: Sequence[Fit], budget: str, reserve: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"What fits in {budget}, {reserve} of it left free")
    for heading in ("", "activation checkpointing", *PAIR):
        table.add_column(heading, justify="right" if heading in PAIR else "left")
    titles = {BATCH: "largest local batch", SEQUENCE: "longest sequence", GPUS: "fewest GPUs"}
    for question in dict.fromkeys(fit.question for fit in fits):
        for mode in MODES:
            pair = [_answer(fit) for fit in fits if (fit.question, fit.checkpointing) == (question, mode)]
            table.add_row(titles[question], mode, *pair)
        table.add_section()
    console.print(table)
    console.print(
        f"Each with the other two as configured: {run.ngpu:,} GPUs, local batch {run.batch}, sequence {run.seq_len:,}. "
        "In brackets: the peak at that value, and at the next one, which does not fit.",
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


def as_json(run: Simulated) -> dict[str, Any]:
    """One run for JSON; sizes are in bytes."""
    facts = {key: value for key, value in asdict(run).items() if key != "peaks"}
    facts["optimizers"] = {}
    for name, phases in run.peaks.items():
        peak = run.peak(name)
        facts["optimizers"][name] = {
            "peak_bytes": peak.total,
            "phase": peak.phase,
            "phases": [asdict(phase) for phase in phases],
        }
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
