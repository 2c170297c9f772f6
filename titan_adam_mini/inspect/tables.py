"""The results of `inspect` as tables, and the lines for a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from math import isinf
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .estimates import DEFAULT
from .findings import FACTOR, ROLES, THRESHOLD, Inspection, Pattern

WIDTH = 200
_BUDGET = "at most rows + columns + 1 second moments, and fewer than elements"


def show(inspection: Inspection, console: Console) -> None:
    """Print the tables, what their figures mean, and what to try."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)

    def print_line(line: str, **style: Any) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False, **style)

    console.print(_table(inspection))
    for line in _notes(inspection):
        print_line(line)
    print_line("All parameters together, with each second_moment and the configured roles:")
    console.print(_settings(inspection))
    for name, reason in inspection.refused.items():
        print_line(f'second_moment = "{name}" is left out: {reason}.')
    roles, option = inspection.roles, inspection.second_moment
    if not roles:
        print_line(_nothing(inspection), style="bold")
        return
    if not option and inspection.best_option != inspection.partition.second_moment:
        print_line(f'The best single setting: second_moment = "{inspection.best_option}".')
    if not option and inspection.undecayed:
        print_line(f"With the roles below, `undecayed` removes weight decay from {', '.join(inspection.undecayed)}.")
    other = f"another role if the ratio is below {THRESHOLD:g} and the other role's at least {FACTOR:g} times that"
    other = f"equivalent to {other}" if option else other
    print_line(f"To try ({other}; configured roles are kept):", style="bold")
    print_line(toml(f'second_moment = "{option}"' if option else f"roles = {_inline(roles)}"))


def toml(line: str) -> str:
    """A line of a configuration under its heading."""
    return f"[optimizer.adam_mini]\n{line}"


def _inline(roles: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{pattern}" = "{role}"' for pattern, role in roles.items()) + "}"


def _nothing(inspection: Inspection) -> str:
    """Why no role is suggested."""
    if all(pattern.default.snr >= THRESHOLD for pattern in inspection.patterns):
        return f"Nothing to change: no ratio is below {THRESHOLD:g}."
    return (
        f"No roles to try: where the default's ratio is below {THRESHOLD:g}, no other with {_BUDGET} is {FACTOR:g} "
        "times that."
    )


def _table(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    candidates = [name for name in inspection.candidates if name != "elementwise"]
    for column in ("pattern", "n", "shape", "role"):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
    for column in (*candidates, "RMS", "distance"):
        table.add_column(column, justify="right")
    table.add_column("best")
    for pattern in inspection.patterns:
        estimate, default = pattern.estimates[DEFAULT], pattern.default
        shape = "x".join(map(str, pattern.shape))
        cells = [_cell(pattern, name) for name in candidates]
        updates = [_share(default.rms_ratio), _share(default.distance)]
        table.add_row(pattern.pattern, str(len(pattern.names)), shape, estimate.role, *cells, *updates, _best(pattern))
    return table


def _cell(pattern: Pattern, candidate: str) -> str:
    if candidate not in pattern.losses or not pattern.default.known:
        return ""
    return f"{_ratio(pattern.losses[candidate].snr)} [dim]({_short(pattern.estimates[candidate].entries)})[/dim]"


def _best(pattern: Pattern) -> str:
    if pattern.best is None:
        return "no gradient"
    return DEFAULT if pattern.best == DEFAULT else f"{pattern.best} ({_ratio(pattern.losses[pattern.best].snr)})"


def _settings(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("second_moment")
    for column in ("entries", f"patterns below {THRESHOLD:g}", "lowest"):
        table.add_column(column, justify="right")
    table.add_column("of", overflow="fold")
    for column in ("RMS", "distance"):
        table.add_column(column, justify="right")
    for name, setting in inspection.settings.items():
        label = {inspection.partition.second_moment: f"{name} (configured)", ROLES: "the roles below"}.get(name, name)
        total, (pattern, lowest) = setting.total, setting.lowest
        counts = [f"{total.entries:,}", str(setting.below), _ratio(lowest.snr)]
        table.add_row(label, *counts, pattern.pattern, _share(total.rms_ratio), _share(total.distance))
    return table


def _ratio(value: float) -> str:
    return "inf" if isinf(value) else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _short(entries: int) -> str:
    """A count in at most four characters: 512, 8.2k, 131k, 16M."""
    value, unit = float(entries), ""
    for larger in ("k", "M", "G"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}"


def _notes(inspection: Inspection) -> list[str]:
    notes = [
        "Per candidate: 1 / mean over elements of (v / estimate - 1)^2, and the number of second moments of one "
        "parameter. The first row loses most.",
        "RMS and distance: of AdamW's last update with the default's second moments in place of its own, the RMS and "
        "the RMS of the difference to AdamW's update, both relative to the RMS of AdamW's.",
        f"best: the highest ratio with {_BUDGET} (for a vector, as many as elements).",
    ]
    if without := inspection.without_gradient:
        number = sum(without.values())
        parameters = f"{number} parameter{'s' * (number > 1)}"
        notes.append(f"Never had a gradient, and left out: {parameters} ({', '.join(without)}).")
    return notes
