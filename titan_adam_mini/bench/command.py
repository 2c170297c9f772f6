"""The command `bench`: arguments, caption, table, JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..about import device_name, version
from ..child import in_child
from ..files import atomic_write
from ..flags import ConfigFile, check_config, check_file, number_of_ranks
from .competitors import BASELINE, chosen
from .measure import WARM_UP, Measured, Result, bytes_free, bytes_moved, bytes_needed, measure
from .part import Part, allocated

WIDTH = 180
DTENSORS = (
    "It steps the run's own DTensors; the others, unless the name says otherwise, plain local tensors, their best case."
)
PLAIN = "Nothing is sharded: all step plain tensors."


@dataclass
class Bench:
    """Show step time and state of AdamW, AdamMini and their peers side by side, on the shapes that one rank holds.

    The model is built by torchtitan on the meta device at the real number of ranks; only one rank's part is allocated,
    with random gradients. Takes any of torchtitan's --section.key value besides; the configuration may also be given
    as --job.config_file X or CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: int | None = None
    """Number of ranks of the run."""

    rank: int = 0
    """The rank whose part is measured."""

    repeats: int = 20
    """Timed steps of every optimizer, after three that are not timed."""

    layers: int | None = None
    """Keep only so many of the model's transformer layers."""

    only: str = ""
    """Parts of the names to measure, such as "AdamMini,torchao"; AdamW fused always is."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the parameters: as --training.dtype, which the configuration gives."""

    device: Literal["cuda", "cpu"] | None = None
    """Where; a GPU if there is one."""

    threads: int | None = None
    """Threads on the CPU; torch's choice if not given."""

    json: Path | None = None
    """A file for everything that was seen, every single time included."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        ngpu, device = self._checked()
        dtype = ["--training.dtype", self.dtype] if self.dtype else []
        part: Part = in_child(_read_part, [*arguments, *dtype], ngpu, self.rank, self.layers)
        competitors = chosen(self.only, part)
        self._fits(part, device)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with allocated(part, ngpu, self.rank, device) as tensors:
                measured = measure(competitors, part, tensors, device, self.repeats)
            facts = self._facts(part, measured, device, ngpu, arguments)
        finally:
            torch.set_num_threads(before)
        rows = [_row(result, part, measured) for result in measured.results]
        if self.json:
            atomic_write(self.json, json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        if not console.is_terminal:
            console = Console(file=console.file, width=WIDTH)
        for line in _caption(facts):
            console.print(line, soft_wrap=True, highlight=False)
        console.print(_table(rows))

    def _checked(self) -> tuple[int, torch.device]:
        """The number of ranks and the device; ValueError for flags that cannot be served."""
        check_config(self.config)
        ngpu = number_of_ranks(self.ngpu)
        if not 0 <= self.rank < ngpu:
            raise ValueError(f"--rank {self.rank} is none of {ngpu} ranks: they are 0 to {ngpu - 1}")
        if self.repeats < 2:
            raise ValueError(f"--repeats must be 2 or more, not {self.repeats}: one time has no spread")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be 1 or more, not {self.threads}")
        check_file("--json", self.json)
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("--device cuda: torch finds no GPU here")
        kind = self.device or ("cuda" if cuda else "cpu")
        return ngpu, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def _fits(self, part: Part, device: torch.device) -> None:
        needed, free = bytes_needed(part, device), bytes_free(device)
        if not part.numel:
            raise ValueError(f"rank {self.rank} holds no parameters: choose another with --rank")
        if free is not None and needed > free:
            raise ValueError(
                f"rank {self.rank}'s {part.numel:,} parameters need {needed / 2**30:.1f} GiB with gradients and the "
                f"largest state, and {free / 2**30:.1f} GiB are free on {device.type}: keep fewer layers with "
                "--layers L, or look at a run of more ranks with --ngpu N"
            )

    def _facts(
        self, part: Part, measured: Measured, device: torch.device, ngpu: int, arguments: list[str]
    ) -> dict[str, Any]:
        """What the caption says, and the JSON beside the rows."""
        held = [one for one in part.held if one.numel]
        return {
            "device": device_name(device, torch.get_num_threads()),
            "torch": torch.__version__,
            "triton": version("triton"),
            "model": part.model,
            "config": self.config,
            "ngpu": ngpu,
            "rank": self.rank,
            "layers": part.layers,
            "parameters": part.numel,
            "tensors": len(held),
            "sharded": part.sharded,
            "dtypes": sorted({str(one.dtype).removeprefix("torch.") for one in held}),
            "repeats": self.repeats,
            "turns": measured.turns,
            "copy_bytes": measured.copy_bytes,
            "copy_ms": measured.copy.ms,
            "copy_bytes_per_second": measured.bandwidth,
            "command": self._command(ngpu, arguments),
        }

    def _command(self, ngpu: int, arguments: list[str]) -> str:
        """The command that was given, whichever way its parts came in."""
        words = ["titan-adam-mini", "bench", self.config, "--ngpu", str(ngpu)]
        for name in ("rank", "repeats", "layers", "only", "dtype", "device", "threads", "json"):
            if (value := getattr(self, name)) != getattr(Bench, name):
                words += [f"--{name}", str(value)]
        return shlex.join([*words, *arguments[2:]])


def _read_part(*args: Any) -> Any:
    from ..titan.shards import read_part

    return read_part(*args)


def _row(result: Result, part: Part, measured: Measured) -> dict[str, Any]:
    """A result with the figures that follow from it; those that were not seen are None."""
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
        ns_per_parameter=median * 1e6 / part.numel,
        ratio=median / baseline.spread()[1] if baseline.status == "measured" else None,
        state_bytes_per_parameter=result.state_bytes / part.numel,
        share_of_copy=bytes_moved(part.bytes, part.bytes, result.state_bytes) / (median / 1e3) / measured.bandwidth,
    )
    return row


def _caption(facts: dict[str, Any]) -> list[str]:
    layers = ""
    if facts["layers"] and facts["layers"][0] != facts["layers"][1]:
        layers = f", {facts['layers'][0]} of its {facts['layers'][1]} layers kept"
    triton = f"triton {facts['triton']}" if facts["triton"] else "no triton"
    return [
        f"{facts['model']} ({facts['config']}){layers}; rank {facts['rank']} of {facts['ngpu']}: "
        f"{facts['parameters']:,} parameters in {facts['tensors']} tensors, {' and '.join(facts['dtypes'])}",
        f"{facts['device']}; torch {facts['torch']}, {triton}; copy_ of {facts['copy_bytes'] / 2**20:,.0f} MiB: "
        f"{facts['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written",
        f"In turns, after {WARM_UP} steps of warm-up: {facts['turns']}.",
        "Collectives are counted with the bytes that this rank puts into them, and not timed: no other rank is there.",
        "AdamMini's rows name the type of its momentum. " + (DTENSORS if facts["sharded"] else PLAIN),
        "% of copy_: bytes that a step must move (parameters and state read and written, gradients read) over its "
        "time, as a share of what copy_ moves.",
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
            told = row["status"] if row["status"] == "not installed" else row["note"]
            table.add_row(name, *[""] * (len(headings) + 1), told)
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
