"""The stages in order, within a budget: prints a table and keeps a json, rewritten after each."""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runs import ROOT

from gpu_check.runner import FAIL, Outcome, Stage, run

STAGES = (
    Stage("environment", limit=60, least=5),
    Stage("kernels", limit=120, least=20),
    Stage("oracle", limit=90, least=15),
    Stage("steady", limit=90, least=20),
    Stage("captured", limit=60, least=15),
    Stage("bench", limit=100, least=30),
    Stage("train", limit=180, least=60),
    Stage("trace", limit=60, least=20),
    Stage("float8", limit=60, least=30),
)
RESERVE = 10.0
"""Seconds kept back: a stage that is stopped gets some to end."""


def main() -> int:
    """Run the stages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where the results go")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check", help="where the logs go")
    parser.add_argument("--only", default="", help="some stages, comma-separated: " + ",".join(s.name for s in STAGES))
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name] or [stage.name for stage in STAGES]
    if unknown := set(wanted) - {stage.name for stage in STAGES}:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    device = os.environ.get("DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        parser.error(f"DEVICE={device} is unknown: cuda or cpu")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as an interrupt does: unwinding ends the stage that runs
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    stages = [stage for stage in STAGES if stage.name in wanted]
    ngpu = int(os.environ.get("NGPU") or _default_ranks(device))
    budget = float(os.environ.get("BUDGET") or 520)
    return check(stages, device, ngpu, budget, options.json, options.out.resolve())


def check(stages: list[Stage], device: str, ngpu: int, budget: float, file: Path, out: Path) -> int:
    """Run `stages` and print a row for each as it ends; returns 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report: dict[str, Any] = {"device": device, "ngpu": ngpu, "budget": budget, "seconds": 0.0, "stages": []}
    outcomes: list[Outcome] = []
    print(f"{'stage':12s} {'status':8s} {'seconds':>7s}  what", flush=True)
    for stage in stages:
        left = budget - RESERVE - (time.monotonic() - started)
        outcome = run(stage, left, {"--device": device, "--ngpu": ngpu}, out)
        outcomes.append(outcome)
        report |= {"seconds": round(time.monotonic() - started, 1), "stages": [asdict(one) for one in outcomes]}
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(file)
        print(f"{outcome.name:12s} {outcome.status:8s} {outcome.seconds:7.1f}  {outcome.line}", flush=True)
        for line in outcome.tail:
            print(f"{'':12s} | {line}", flush=True)
    failed = [outcome.name for outcome in outcomes if outcome.status == FAIL]
    print(f"\n{', '.join(failed) + ' failed' if failed else 'nothing failed'}; {report['seconds']:.0f} s; {file}")
    return 1 if failed else 0


def _default_ranks(device: str) -> int:
    if device == "cpu":
        return 2
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
