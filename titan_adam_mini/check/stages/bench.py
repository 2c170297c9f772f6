"""`titan-adam-mini bench` on the shapes of one rank of 8, 64 and 1024 of Llama 3 8B; the JSON files are merged."""

import json
import subprocess
import sys
import time
from typing import Any

from ..sizes import SMALL
from ..stage import Context, Result
from ..trainer import CONFIG, need_packages

RANKS = (8, 64, 1024)
LEAST = 15.0
"""Minimum of remaining seconds to begin another number of ranks."""


def run(context: Context) -> Result:
    """Passes if the command succeeds for every number of ranks that fits into the time."""
    need_packages()
    numbers: dict[str, Any] = {}
    lines: list[str] = []
    wrong: list[str] = []
    for ranks in RANKS if context.cuda else (context.ngpu,):
        if numbers and context.left < LEAST:
            lines.append(f"{ranks} ranks: no time left")
            continue
        file = context.out / f"bench-{ranks}.json"
        file.unlink(missing_ok=True)
        words = ["bench", str(CONFIG), "--ngpu", str(ranks), "--json", str(file), "--device", context.device]
        if context.cuda:  # some other optimizers compile for minutes; run the command itself to measure all
            words += ["--repeats", "8", "--only", "AdamW fused,AdamW foreach,AdamMini fused"]
        else:
            words += ["--repeats", "2", "--model.flavor", f"check_{SMALL.name}"]
        started = time.monotonic()
        command = [sys.executable, "-m", "titan_adam_mini.cli", *words]
        try:
            status = subprocess.run(command, timeout=max(1.0, context.left - 3)).returncode
        except subprocess.TimeoutExpired:
            (lines if numbers else wrong).append(f"{ranks} ranks: stopped, no time left")
            continue
        if status != 0 or not file.is_file():
            wrong.append(f"{ranks} ranks: status {status}")
            continue
        numbers[str(ranks)] = json.loads(file.read_text())
        rows = numbers[str(ranks)].get("rows", [])
        seconds = time.monotonic() - started
        lines.append(f"{ranks} ranks ({seconds:.0f} s): {', '.join(filter(None, map(_summary, rows)))}")
        wrong += [
            f"{ranks} ranks: {row['name']}: {row.get('note') or row.get('status')}" for row in rows if _failed(row)
        ]
        Result(False, "; ".join([*wrong, *lines, "the next did not end"]), numbers).write(context.result)
    return Result(bool(numbers) and not wrong, "; ".join([*wrong, *lines]), numbers)


def _summary(row: dict[str, Any]) -> str:
    """A row of the benchmark: its name, median step time and ratio to fused AdamW."""
    if row.get("median_ms") is None:
        return ""
    ratio = "" if row.get("ratio") is None else f" ({row['ratio']:.2f})"
    return f"{row['name']} {row['median_ms']:.2f} ms{ratio}"


def _failed(row: dict[str, Any]) -> bool:
    """Whether an AdamMini row was not measured; packages of other optimizers may be missing."""
    return "AdamMini" in row["name"] and row.get("median_ms") is None
