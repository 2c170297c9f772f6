"""The command `snapshot`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..files import atomic_write
from ..tools.flags import check_file
from .picture import CATEGORIES, stacked_bars
from .snapshot import MAX_ENTRIES, Snapshot, Summary, read, summarize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MIB = 1 << 20
UNUSED = "reserved, unused"


@dataclass(frozen=True)
class _Row:
    """A row of the table; with `plain` its value is a count, else a number of bytes."""

    name: str
    value: Callable[[Summary], int]
    plain: bool = False


_ROWS = (
    _Row("allocated at the peak", lambda summary: summary.peak.allocated),
    _Row("reserved, its own peak", lambda summary: summary.peak_reserved),
    _Row("allocated at the end", lambda summary: summary.end.allocated),
    _Row("reserved at the end", lambda summary: summary.end.reserved),
    _Row("  free in it", lambda summary: summary.free),
    _Row("  largest free block", lambda summary: summary.largest_free),
    _Row("  lost to rounding", lambda summary: summary.rounding),
    _Row("  awaiting another stream", lambda summary: summary.awaiting),
    _Row("segments", lambda summary: summary.segments, plain=True),
    _Row("allocations in the trace", lambda summary: summary.allocations, plain=True),
    _Row("out of memory in the trace", lambda summary: summary.ooms, plain=True),
)


@dataclass
class SnapshotCommand:
    """Show memory in use at the peak and at the end of one or two memory snapshots, by category, side by side.

    The files are those of torchtitan's [profiling] enable_memory_snapshot, or of torch.cuda.memory._dump_snapshot.
    Nothing in a file is executed.
    """

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A.pickle")]
    """A snapshot."""

    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[B.pickle]")] = ""
    """A second snapshot, to compare with the first."""

    device: int | None = None
    """The device to show, if a file has several."""

    json: Path | None = None
    """Write all figures to this file, in bytes."""

    plot: Path | None = None
    """Draw stacked bars to this file, such as out.png."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        check_file("--json", self.json)
        check_file("--plot", self.plot)
        names = ["A", "B"] if self.second else ["A"]
        snapshots, summaries = [], []
        for name, path in zip(names, (self.first, Path(self.second)), strict=False):
            with console.status(f"reading {name}: {path}"):
                snapshots.append(read(path, self.device))
                summaries.append(summarize(snapshots[-1]))
        for line in _captions(names, snapshots, summaries):
            console.print(line, soft_wrap=True, highlight=False)
        console.print(_table(names, summaries))
        if self.json is not None:
            atomic_write(self.json, json.dumps(_figures(names, snapshots, summaries), indent=1) + "\n")
        if self.plot is not None:
            _plot(self.plot, names, snapshots, summaries)


def _captions(names: list[str], snapshots: list[Snapshot], summaries: list[Summary]) -> list[str]:
    """For each file its path, device and optimizer, and the limits of its figures."""
    lines = []
    for name, snapshot, summary in zip(names, snapshots, summaries, strict=True):
        by = f", {snapshot.optimizer}" if snapshot.optimizer else ""
        lines.append(f"{name}: {snapshot.path}, device {snapshot.device}{by}")
        if not summary.entries:
            lines.append("  It has no trace: the peak is the memory allocated at the end.")
        else:
            span = "" if summary.seconds is None else f", {summary.seconds:.1f} s"
            full = ", the most that torchtitan keeps: earlier ones are lost" if summary.entries >= MAX_ENTRIES else ""
            lines.append(
                f"  Trace: the last {summary.entries:,} entries{span}{full}. Peak after entry {summary.peak_entry:,}."
            )
            if summary.peak_entry == 0:
                lines.append("  The peak is before the first entry: more may have been allocated earlier.")
        if not snapshot.tensors:
            lines.append(
                "  It does not name parameters, gradients and optimizer state (snapshots of runs with "
                "TITAN_ADAM_MINI_NAMED_SNAPSHOTS=1 do, docs/torchtitan.md): they are classified by stacks alone, and "
                "FSDP's gradients count as reduce-scatter."
            )
        if summary.peak.without_frames or summary.end.without_frames:
            lines.append(
                f"  Of `other`, {summary.peak.without_frames:,} bytes at the peak and {summary.end.without_frames:,} "
                "at the end have no stack: they were allocated before recording began."
            )
        if summary.unmatched:
            lines.append(
                f"  {summary.unmatched:,} entries are inconsistent with the blocks at the end: the peak may be off "
                "by them."
            )
        if summary.strangers:
            lines.append(f"  {summary.strangers:,} bytes of the tensors that it names are in no block of this device.")
    return lines


def _table(names: list[str], summaries: list[Summary]) -> Table:
    """A row per figure; with two files, the last column is their difference."""
    from rich import box
    from rich.table import Table

    two = len(names) == 2
    table = Table("MiB", *names, *(["B - A"] if two else []), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, values: list[int], plain: bool = False) -> None:
        figures = [*values, *([values[1] - values[0]] if two else [])]
        signs = [""] * len(values) + ["+"]
        shown = [
            f"{figure:{sign},}" if plain else f"{figure / MIB:{sign},.1f}"
            for figure, sign in zip(figures, signs, strict=False)
        ]
        table.add_row(name, *shown)

    for row in _ROWS:
        add(row.name, [row.value(summary) for summary in summaries], row.plain)
    for title, moments in (
        ("at the peak", [summary.peak for summary in summaries]),
        ("at the end", [summary.end for summary in summaries]),
    ):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for category in CATEGORIES:
            values = [moment.categories.get(category, 0) for moment in moments]
            if any(values):
                add(f"  {category}", values)
    return table


def _figures(names: list[str], snapshots: list[Snapshot], summaries: list[Summary]) -> dict[str, Any]:
    """The content of --json: bytes and counts, with the names of `Summary` and `Moment` as keys."""
    figures: dict[str, Any] = {"unit": "bytes"}
    for name, snapshot, summary in zip(names, snapshots, summaries, strict=True):
        about = {"path": str(snapshot.path), "device": snapshot.device, "optimizer": snapshot.optimizer}
        figures[name] = about | asdict(summary)
    return figures


def _plot(path: Path, names: list[str], snapshots: list[Snapshot], summaries: list[Summary]) -> None:
    bars = []
    for when in ("peak", "end"):
        for name, snapshot, summary in zip(names, snapshots, summaries, strict=True):
            moment = getattr(summary, when)
            unused = {UNUSED: moment.reserved - moment.allocated}
            by = f": {snapshot.optimizer}" if snapshot.optimizer else ""
            bars.append((f"{name}{by}\nat the {when}", moment.categories | unused))
    note = "\n".join(
        f"{name}: {snapshot.path.parent.name}/{snapshot.path.name}"
        for name, snapshot in zip(names, snapshots, strict=True)
    )
    stacked_bars(path, "Memory of one device, from its snapshots", bars, note=note)
