"""The command `inspect`: arguments, table, TOML, JSON, picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from ..drawing import require_matplotlib
from ..flags import STDOUT, ConfigFile, JsonFile, check_config, check_file, check_folder, ranks_of_a_run, write_json
from ..partition import Partition
from .estimates import DEFAULT
from .findings import FACTOR, ROLES, THRESHOLD, Inspection, Pattern, inspect
from .heat_map import heat_map
from .moments import moments_stored
from .short_run import check_out, short_run

WIDTH = 200
PICTURE = "heat_map.png"
_BUDGET = "no more second moments than rows + columns + 1, and fewer than elements"


@dataclass
class Inspect:
    """Say where one second moment per block loses information, and which blocks would lose less.

    Looks at the second moments of an AdamW checkpoint of torchtitan (--checkpoint), or of a short AdamW run of the
    configuration (--steps), a window of one tensor at a time; needs no GPU and no weights. How even they are within
    blocks is a signal-to-noise ratio: above 1 means stand for their elements. The line printed at the end goes into
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
        stored = None if self.checkpoint is None else Stored(self.checkpoint)
        found = in_child(_read_partition, arguments)  # before a run that may take hours
        if self.out is not None:
            self.out.mkdir(exist_ok=True)
        if stored is not None:
            self._inspect(stored, str(self.checkpoint), console, *found)
            return
        assert self.steps is not None
        with short_run(arguments, self.steps, ranks_of_a_run(self.ngpu), self.out, console) as path:
            source = str(path) if self.out else f"a run of {self.steps} steps"
            self._inspect(Stored(path), source, console, *found)

    def _check(self) -> None:
        """ValueError for flags that cannot be served."""
        check_config(self.config)
        check_file("--json", self.json)
        check_folder("--out", self.out)
        if (self.checkpoint is None) == (self.steps is None):
            raise ValueError("whose second moments? give --checkpoint outputs/checkpoint/step-N, or --steps N to train")
        if self.checkpoint is not None and self.ngpu is not None:
            raise ValueError("--ngpu is for the run of --steps, and nothing is run with --checkpoint: leave it out")
        if self.steps is not None:
            if self.steps < 1:
                raise ValueError(f"--steps must be 1 or more, not {self.steps}")
            check_out(self.out)
            ranks_of_a_run(self.ngpu)  # raises for what is no number
        if self.out is not None:
            require_matplotlib()

    def _inspect(
        self,
        stored: Stored,
        source: str,
        console: Console,
        model: str,
        partition: Partition,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        moments = moments_stored(stored, shapes)
        with _progress(console, len(moments)) as advance:
            inspection = inspect(moments, partition, on_parameter=lambda name: advance())
        if self.json:
            write_json(self.json, {"config": self.config, "model": model, "source": source, **inspection.facts()})
        if not console.is_terminal:
            console = Console(file=console.file, width=WIDTH)
        if self.json != STDOUT:
            console.print(f"{model} ({self.config}), {source}", soft_wrap=True, highlight=False)
            show(inspection, console)
        if self.out is not None:
            heat_map(self.out / PICTURE, f"{model}, {source}", inspection)
            if self.json != STDOUT:
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
    """Print what was found, for reading: the tables, what their figures are, and what to try."""

    def say(line: str, **how: Any) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False, **how)

    console.print(_table(inspection))
    for line in _notes(inspection):
        say(line)
    say("All parameters together, with each second_moment and the roles that the configuration has:")
    console.print(_settings(inspection))
    for left_out, why in inspection.refused.items():
        say(f'second_moment = "{left_out}" is left out: {why}.')
    roles, option = inspection.roles, inspection.second_moment
    if not roles:
        say(_nothing(inspection), style="bold")
        return
    if not option and inspection.best_option != inspection.partition.second_moment:
        say(f'The best in one line: second_moment = "{inspection.best_option}".')
    if not option and inspection.undecayed:
        say(f"With the roles below, `undecayed` takes weight decay from {', '.join(inspection.undecayed)}.")
    other = f"another role where the ratio is below {THRESHOLD:g} and the other's at least {FACTOR:g} times that"
    other = f"the same as {other}" if option else other
    say(f"To try ({other}; roles that the configuration has stay):", style="bold")
    say(toml(f'second_moment = "{option}"' if option else f"roles = {_inline(roles)}"))


def toml(line: str) -> str:
    """A line of a configuration under its heading."""
    return f"[optimizer.adam_mini]\n{line}"


def _inline(roles: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{pattern}" = "{role}"' for pattern, role in roles.items()) + "}"


def _nothing(inspection: Inspection) -> str:
    """Why no role is suggested."""
    if all(one.default.snr >= THRESHOLD for one in inspection.patterns):
        return f"Nothing to change: no ratio is below {THRESHOLD:g}."
    return (
        f"No roles to try: where the default's ratio is below {THRESHOLD:g}, no other at {_BUDGET} is {FACTOR:g} times "
        "that."
    )


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
        moved = [_share(default.rms_ratio), _share(default.distance)]
        table.add_row(one.pattern, str(len(one.names)), shape, estimate.role, *cells, *moved, _best(one))
    return table


def _cell(one: Pattern, candidate: str) -> str:
    if candidate not in one.losses or not one.default.known:
        return ""
    return f"{_ratio(one.losses[candidate].snr)} [dim]({_short(one.estimates[candidate].entries)})[/dim]"


def _best(one: Pattern) -> str:
    if one.best is None:
        return "no gradient"
    return DEFAULT if one.best == DEFAULT else f"{one.best} ({_ratio(one.losses[one.best].snr)})"


def _settings(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("second_moment")
    for column in ("entries", f"patterns below {THRESHOLD:g}", "lowest"):
        table.add_column(column, justify="right")
    table.add_column("of", overflow="fold")
    for column in ("RMS", "apart"):
        table.add_column(column, justify="right")
    for name, setting in inspection.settings.items():
        told = {inspection.partition.second_moment: f"{name} (configured)", ROLES: "the roles below"}.get(name, name)
        total, (pattern, lowest) = setting.total, setting.lowest
        counts = [f"{total.entries:,}", str(setting.below), _ratio(lowest.snr)]
        table.add_row(told, *counts, pattern.pattern, _share(total.rms_ratio), _share(total.distance))
    return table


def _ratio(value: float) -> str:
    return "inf" if isinf(value) else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _short(entries: int) -> str:
    """A count in four letters: 512, 8.2k, 131k, 16M."""
    value, unit = float(entries), ""
    for larger in ("k", "M", "G"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}"


def _notes(inspection: Inspection) -> list[str]:
    notes = [
        "Per candidate: 1 / mean over elements of (v / estimate - 1)^2, and the second moments that one parameter then "
        "keeps. Most is lost in the first row.",
        "RMS and apart: AdamW's last update with the default's second moments in place of its own, its RMS and the RMS "
        "of the difference, over the RMS of AdamW's.",
        f"best: the highest ratio at {_BUDGET} (of a vector, as many).",
    ]
    if without := inspection.without_gradient:
        number = sum(without.values())
        parameters = f"{number} parameter{'s' * (number > 1)}"
        notes.append(f"Never had a gradient, and left out: {parameters} ({', '.join(without)}).")
    return notes
