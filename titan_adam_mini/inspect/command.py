"""The command `inspect`: arguments, table, TOML, JSON, picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..checkpoint.stored import Stored
from ..child import in_child
from ..flags import STDOUT, ConfigFile, JsonFile, check_config, check_folder, write_json
from .estimates import DEFAULT
from .findings import FACTOR, THRESHOLD, Inspection, Pattern, inspect
from .heat_map import heat_map
from .moments import moments_stored
from .short_run import short_run

WIDTH = 200
PICTURE = "heat_map.png"


@dataclass
class Inspect:
    """Say where one second moment per block loses information, and which blocks would lose less.

    Looks at the second moments of an AdamW checkpoint of torchtitan (--checkpoint), or of a short AdamW run of the
    configuration (--steps), a window of one tensor at a time; needs no GPU and no weights. How even they are within
    blocks is a signal-to-noise ratio: above 1 averaging is safe. The roles printed at the end go into
    [optimizer.adam_mini]. Takes any of torchtitan's --section.key value besides; the configuration may also be given as
    --job.config_file X or CONFIG_FILE=X.
    """

    config: ConfigFile
    """torchtitan's configuration of the run."""

    checkpoint: Path | None = None
    """A checkpoint with AdamW's state, such as outputs/checkpoint/step-1000."""

    steps: int | None = None
    """Without a checkpoint: train the configuration with AdamW for its first so many steps, and look at that."""

    ngpu: int | None = None
    """Number of ranks of this short run; NGPU, or one, if not given."""

    out: Path | None = None
    """A folder for the heat map (heat_map.png), and for the short run, which is otherwise removed."""

    json: JsonFile = None
    """JSON in place of the table; into a file, if one is named, beside it. For its keys see inspect/findings.py."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        self._check()
        if self.out is not None:
            self.out.mkdir(exist_ok=True)
        if self.checkpoint is not None:
            stored = Stored(self.checkpoint)
            self._inspect(stored, str(self.checkpoint), console, arguments)
            return
        assert self.steps is not None
        with short_run(arguments, self.steps, self.ngpu, self.out, console) as path:
            source = str(path) if self.out else f"a run of {self.steps} steps"
            self._inspect(Stored(path), source, console, arguments)

    def _check(self) -> None:
        """ValueError for flags that cannot be served."""
        check_config(self.config)
        check_folder("--json", self.json)
        check_folder("--out", self.out)
        if (self.checkpoint is None) == (self.steps is None):
            raise ValueError("whose second moments? give --checkpoint outputs/checkpoint/step-N, or --steps N to train")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be 1 or more, not {self.steps}")

    def _inspect(self, stored: Stored, source: str, console: Console, arguments: list[str]) -> None:
        model, partition, shapes = in_child(_read_partition, arguments)
        moments = moments_stored(stored, shapes)
        with _progress(console, len(moments)) as advance:
            inspection = inspect(moments, partition, on_parameter=lambda name: advance())
        if self.out is not None:
            heat_map(self.out / PICTURE, f"{model}, {source}", inspection)
        if self.json:
            write_json(self.json, {"config": self.config, "model": model, "source": source, **inspection.facts()})
        if self.json == STDOUT:
            return
        if not console.is_terminal:
            console = Console(file=console.file, width=WIDTH)
        console.print(f"{model} ({self.config}), {source}", soft_wrap=True, highlight=False)
        show(inspection, console)
        if self.out is not None:
            console.print(f"Heat map: {self.out / PICTURE}", soft_wrap=True, highlight=False)


def _read_partition(*args: Any) -> Any:
    from ..titan.target import read_partition

    return read_partition(*args)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("parameters", total=total)
        yield lambda: progress.advance(task)


def show(inspection: Inspection, console: Console) -> None:
    """Print what was found, for reading: the table, what its figures are, and the roles to try."""
    console.print(_table(inspection))
    for line in _notes(inspection):
        console.print(line, soft_wrap=True, highlight=False)
    if not (roles := inspection.roles):
        console.print(
            f"No roles to try: where the default's ratio is below {THRESHOLD:g}, none is {FACTOR:g} times it.",
            style="bold",
        )
        return
    console.print(
        f"To try (ratio below {THRESHOLD:g}, and at least {FACTOR:g} times it with the new role; roles that the "
        "configuration has are kept):",
        style="bold",
        soft_wrap=True,
    )
    console.print(toml(roles), soft_wrap=True, highlight=False, markup=False)


def toml(roles: dict[str, str]) -> str:
    """Roles as lines of a configuration."""
    table = ", ".join(f'"{pattern}" = "{role}"' for pattern, role in roles.items())
    return f"[optimizer.adam_mini]\nroles = {{{table}}}"


def _table(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    candidates = [name for name in inspection.candidates if name != "elementwise"]
    for column in ("pattern", "n", "shape", "role"):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
    for column in (*candidates, "RMS", "apart"):
        table.add_column(column, justify="right")
    table.add_column("best")
    for one in inspection.patterns:
        estimate, default = one.estimates[DEFAULT], one.default
        shape = "x".join(map(str, one.shape))
        cells = [_cell(one, name) for name in candidates]
        moved = ["" if value is None else f"{value:.2f}" for value in (default.rms_ratio, default.distance)]
        table.add_row(one.pattern, str(len(one.names)), shape, estimate.role, *cells, *moved, _best(one))
    return table


def _cell(one: Pattern, candidate: str) -> str:
    if candidate not in one.losses:
        return ""
    return f"{_ratio(one.losses[candidate].snr)} [dim]({_short(one.estimates[candidate].entries)})[/dim]"


def _best(one: Pattern) -> str:
    name = one.best
    if name == DEFAULT:
        return DEFAULT
    return f"{name} ({_ratio(one.losses[name].snr)})"


def _ratio(value: float) -> str:
    return "inf" if isinf(value) else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _short(entries: int) -> str:
    """A count in four letters: 512, 8.2k, 131k, 16M."""
    value, unit = float(entries), ""
    for larger in ("k", "M", "G"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}"


def _notes(inspection: Inspection) -> list[str]:
    return [
        "Per candidate: 1 / mean over elements of (v / estimate - 1)^2, and the second moments that one parameter then "
        "keeps. Most is lost in the first row.",
        "RMS and apart: AdamW's next update with the default's second moments in place of its own, its RMS and the RMS "
        "of the difference, over the RMS of AdamW's.",
        "best: the highest ratio at no more second moments than rows + columns + 1 (a vector's elements).",
    ]
