"""Prints what every mesh gives: `python tests/show_meshes.py [words that a mesh's name holds]`.

Per mesh the largest error of parameters and second moments against the single-device float64 oracle over 20 steps,
relative to the largest entry, and the collectives of one step of the optimizer.
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from ranks import run  # noqa: E402
from training import CASES, Call, Case, train  # noqa: E402

HEADINGS = ("mesh", "ranks", "parameters", "second moments", "collectives per step, and the numbers sent by rank 0")


def told(calls: list[Call], case: Case) -> str:
    """The collectives of rank 0, by the mesh axis whose ranks take part."""
    names, stride = {}, 1
    for name, size in reversed(case.axes):
        names[tuple(range(0, size * stride, stride))] = name
        stride *= size
    sent: dict[tuple[str, str], list[str]] = {}
    for op, group, numel in calls:
        sent.setdefault((op, names[group]), []).append(str(numel))
    return ", ".join(f"{len(sizes)} {op} on {axis} ({'+'.join(sizes)})" for (op, axis), sizes in sent.items())


def row(name: str, results: list[dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table from what all ranks returned."""
    worst = {key: max(result["errors"][key] for result in results) for key in ("param", "exp_avg_sq")}
    calls = told(results[0]["later"], CASES[name])
    return name, str(len(results)), f"{worst['param']:.1e}", f"{worst['exp_avg_sq']:.1e}", calls or "none"


def main() -> None:
    """Run the meshes whose names hold all words of the command line."""
    widths = (max(map(len, CASES)), 5, 10, 14, 0)
    chosen = {name: case for name, case in CASES.items() if all(word in name for word in sys.argv[1:])}
    for line in chain(
        [HEADINGS], (row(name, run(train, case.world, case, timeout=600)) for name, case in chosen.items())
    ):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
