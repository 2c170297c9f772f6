"""The results as rows for JSON and as a table with its caption."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .competitors import BASELINE
from .measure import WARM_UP, Measured, Result, bytes_moved
from .rank_params import RankParams

WIDTH = 180
DTENSORS = (
    "It steps the run's own DTensors; the others, unless their name mentions DTensors, step plain local tensors, their "
    "best case."
)
PLAIN = "Nothing is sharded: all step plain tensors."


def show(facts: dict[str, Any], rows: list[dict[str, Any]], console: Console) -> None:
    """Print the caption and the table."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    for line in caption(facts):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_table(rows))


def row_of(result: Result, rank_params: RankParams, measured: Measured) -> dict[str, Any]:
    """A result with the figures derived from it; unknown ones are None."""
    row: dict[str, Any] = asdict(result)
    derived = (
        "p10_ms",
        "median_ms",
        "p90_ms",
        "ns_per_parameter",
        "ratio",
        "state_bytes_per_parameter",
        "share_of_copy",
    )
    row.update(dict.fromkeys(derived))
    if result.status != "measured":
        return row
    low, median, high = result.spread()
    baseline = measured.results[0]
    row.update(
        p10_ms=low,
        median_ms=median,
        p90_ms=high,
        ns_per_parameter=median * 1e6 / rank_params.numel,
        ratio=median / baseline.spread()[1] if baseline.status == "measured" else None,
        state_bytes_per_parameter=result.state_bytes / rank_params.numel,
        share_of_copy=bytes_moved(rank_params.bytes, rank_params.bytes, result.state_bytes)
        / (median / 1e3)
        / measured.bandwidth,
    )
    return row


def caption(facts: dict[str, Any]) -> list[str]:
    """What was measured, where and how, as lines of text."""
    layers = ""
    if facts["layers"] and facts["layers"][0] != facts["layers"][1]:
        layers = f", {facts['layers'][0]} of its {facts['layers'][1]} layers kept"
    triton = f"triton {facts['triton']}" if facts["triton"] else "no triton"
    return [
        f"{facts['model']} ({facts['config']}){layers}; rank {facts['rank']} of {facts['ngpu']}: "
        f"{facts['parameters']:,} parameters in {facts['tensors']} tensors, {' and '.join(facts['dtypes'])}",
        f"{facts['device']}; torch {facts['torch']}, {triton}; copy_ of {facts['copy_bytes'] / 2**20:,.0f} MiB: "
        f"{facts['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written",
        f"In turns, after {WARM_UP} warm-up steps: {facts['turns']}.",
        "Collectives are counted, with the bytes of this rank, and not timed, because there is no other rank.",
        "AdamMini's rows name the dtype of its momentum. " + (DTENSORS if facts["sharded"] else PLAIN),
        "% of copy_: bytes that a step must move (parameters and state read and written, gradients read) per time, "
        "relative to copy_.",
        facts["command"],
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    headings = ("median ms", "10-90 %", "ns/param", f"x {BASELINE}", "state B/param", "% of copy_", "launches")
    for heading in (*headings, "collectives"):
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        name = f"{row['name']} {row['version']}".strip()
        if row["status"] != "measured":
            note = row["status"] if row["status"] == "not installed" else row["note"]
            table.add_row(name, *[""] * (len(headings) + 1), note)
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        launches = "-" if row["launches"] is None else f"{row['launches']:,}"
        sent = f"{row['collectives']} ({row['collective_bytes']:,} B)" if row["collectives"] else "0"
        table.add_row(
            name,
            f"{row['median_ms']:.3f}",
            f"{row['p10_ms']:.3f}-{row['p90_ms']:.3f}",
            f"{row['ns_per_parameter']:.4f}",
            ratio,
            f"{row['state_bytes_per_parameter']:.3f}",
            f"{100 * row['share_of_copy']:.0f}",
            launches,
            sent,
            row["note"],
        )
    return table
