"""`titan-adam-mini bench` on Llama 3 8B as one rank of 8, 64 and 1024 holds it; its jsons are merged."""

import json
import re
import subprocess
import sys
import time
from typing import Any

from runs import ROOT

from gpu_check.stage import Check, Result, Skip

RANKS = (8, 64, 1024)
LEAST = 15.0
"""Seconds left under which no other number of ranks is begun."""


def run(check: Check) -> Result:
    """Passes if the command does for every number of ranks that there is time for."""
    known = subprocess.run(
        [sys.executable, "-m", "titan_adam_mini.cli", "--help"], capture_output=True, text=True
    ).stdout
    if not re.search(r"^\s+bench\b", known, re.MULTILINE):
        raise Skip("this version has no command `bench`")
    numbers: dict[str, Any] = {}
    told: list[str] = []
    wrong: list[str] = []
    config = ROOT / "train_configs" / ("llama3_8b.toml" if check.cuda else "debug_model.toml")
    for ranks in RANKS if check.cuda else (check.ngpu,):
        if numbers and check.left < LEAST:
            told.append(f"{ranks} ranks: no time left")
            continue
        file = check.out / f"bench-{ranks}.json"
        file.unlink(missing_ok=True)
        words = ["bench", str(config), "--ngpu", str(ranks), "--json", str(file), "--device", check.device]
        if check.cuda:  # some peers compile for minutes: the command by itself has them all
            words += ["--repeats", "8", "--only", "AdamW fused,AdamW foreach,AdamMini fused"]
        else:
            words += ["--repeats", "2"]
        started = time.monotonic()
        command = [sys.executable, "-m", "titan_adam_mini.cli", *words]
        try:
            status = subprocess.run(command, timeout=max(1.0, check.left - 3)).returncode
        except subprocess.TimeoutExpired:
            (told if numbers else wrong).append(f"{ranks} ranks: stopped, no time left")
            continue
        if status != 0 or not file.is_file():
            wrong.append(f"{ranks} ranks: status {status}")
            continue
        numbers[str(ranks)] = json.loads(file.read_text())
        rows = numbers[str(ranks)].get("rows", [])
        seconds = time.monotonic() - started
        told.append(f"{ranks} ranks ({seconds:.0f} s): {', '.join(filter(None, map(_words, rows)))}")
        wrong += [
            f"{ranks} ranks: {row['name']}: {row.get('note') or row.get('status')}" for row in rows if _failed(row)
        ]
        Result(False, "; ".join([*wrong, *told, "the next did not end"]), numbers).write(check.result)
    return Result(bool(numbers) and not wrong, "; ".join([*wrong, *told]), numbers)


def _words(row: dict[str, Any]) -> str:
    """A row of the benchmark: its name, the median of its step and the ratio to AdamW fused."""
    if row.get("median_ms") is None:
        return ""
    ratio = "" if row.get("ratio") is None else f" ({row['ratio']:.2f})"
    return f"{row['name']} {row['median_ms']:.2f} ms{ratio}"


def _failed(row: dict[str, Any]) -> bool:
    """Whether it is AdamMini's and was not measured; packages of others may be missing."""
    return "AdamMini" in row["name"] and row.get("median_ms") is None
