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
LAYERS = {8: 32, 64: 32, 1024: 32}
LEAST = 15.0
"""Seconds left under which no other number of ranks is begun."""


def run(check: Check) -> Result:
    """Passes if the command does for every number of ranks that there is time for."""
    known = subprocess.run([sys.executable, "-m", "titan_adam_mini.cli"], capture_output=True, text=True).stdout
    if not re.search(r"^\s+bench\b", known, re.MULTILINE):
        raise Skip("this version has no command `bench`")
    numbers: dict[str, Any] = {}
    told, wrong = [], []
    config = ROOT / "train_configs" / ("llama3_8b.toml" if check.cuda else "debug_model.toml")
    for ranks in RANKS if check.cuda else (check.ngpu,):
        if numbers and check.left < LEAST:
            told.append(f"{ranks} ranks: no time left")
            continue
        file = check.out / f"bench-{ranks}.json"
        file.unlink(missing_ok=True)
        words = ["bench", str(config), "--ngpu", str(ranks), "--json", str(file), "--device", check.device]
        if check.cuda:
            words += ["--layers", str(LAYERS[ranks])]
        else:
            words += ["--repeats", "2"]
        started = time.monotonic()
        try:
            status = subprocess.run(
                [sys.executable, "-m", "titan_adam_mini.cli", *words], timeout=check.left
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if status != 0 or not file.is_file():
            wrong.append(f"{ranks} ranks: status {status}")
            continue
        numbers[str(ranks)] = json.loads(file.read_text())
        told.append(f"{ranks} ranks: {time.monotonic() - started:.0f} s")
        Result(False, "; ".join([*wrong, *told, "the next did not end"]), numbers).write(check.result)
    return Result(bool(numbers) and not wrong, "; ".join([*wrong, *told]), numbers)
