"""The command `check`: its flags, the stages within a time budget, the printed table and the JSON file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import atomic_write
from ..tools.flags import check_file, number_of_ranks
from .runner import FAIL, Outcome, Stage, run

if TYPE_CHECKING:
    from rich.console import Console

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
"""Seconds reserved for stages to end after they are stopped."""


@dataclass
class CheckCommand:
    """Check AdamMini on the GPUs of this machine, stage by stage, without a network: PASS, FAIL or SKIPPED.

    The exit status is 1 if a stage failed. Nothing is installed; stages that need missing packages are skipped. On a
    CPU, small versions of the stages run over gloo.
    """

    ngpu: int | None = None
    """Number of GPUs, or of processes on a CPU; by default all GPUs, or 2 processes. Also NGPU=N."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device; stages that need a GPU are skipped on a CPU."""

    budget: float = 520.0
    """Total seconds; stages that no longer fit are skipped."""

    json: Path = Path("gpu_check.json")
    """File for the results, rewritten after every stage."""

    out: Path = Path("outputs/gpu_check")
    """Folder for the logs."""

    only: str = ""
    """Run only these stages: environment,kernels,oracle,steady,captured,bench,train,trace,float8."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        stages, ngpu = self._checked()
        for number in (signal.SIGTERM, signal.SIGHUP):  # like an interrupt: unwinding ends the running stage
            signal.signal(number, lambda received, frame: sys.exit(128 + received))
        if status := check(stages, self.device, ngpu, self.budget, self.json, self.out.resolve()):
            sys.exit(status)

    def _checked(self) -> tuple[list[Stage], int]:
        """The stages and the number of ranks; ValueError for invalid flags."""
        known = [stage.name for stage in STAGES]
        wanted = [name for name in self.only.split(",") if name] or known
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(
                f"--only {self.only}: unknown stage {', '.join(unknown)}; valid stages are {', '.join(known)}"
            )
        if not self.budget > 0:
            raise ValueError(f"--budget must be a positive number of seconds, not {self.budget}")
        check_file("--json", self.json)
        if self.out.is_file():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        if self.ngpu is not None or os.environ.get("NGPU"):
            ngpu = number_of_ranks(self.ngpu)
        elif self.device == "cpu":
            ngpu = 2
        else:
            ngpu = 0
        if self.device == "cuda":
            import torch

            found = torch.cuda.device_count()
            if not found:
                raise ValueError("torch finds no GPU: --device cpu runs small versions of the stages")
            ngpu = ngpu or found
        return [stage for stage in STAGES if stage.name in wanted], ngpu


def check(stages: list[Stage], device: str, ngpu: int, budget: float, file: Path, out: Path) -> int:
    """Run `stages` and print a row for each when it ends; returns 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report: dict[str, Any] = {"device": device, "ngpu": ngpu, "budget": budget, "seconds": 0.0, "stages": []}
    outcomes: list[Outcome] = []
    print(f"{'stage':12s} {'status':8s} {'seconds':>7s}  result", flush=True)
    for stage in stages:
        left = budget - RESERVE - (time.monotonic() - started)
        outcome = run(stage, left, {"--device": device, "--ngpu": ngpu}, out)
        outcomes.append(outcome)
        report |= {"seconds": round(time.monotonic() - started, 1), "stages": [asdict(outcome) for outcome in outcomes]}
        atomic_write(file, json.dumps(report, indent=1) + "\n")
        print(f"{outcome.name:12s} {outcome.status:8s} {outcome.seconds:7.1f}  {outcome.line}", flush=True)
        for line in outcome.tail:
            print(f"{'':12s} | {line}", flush=True)
    failed = [outcome.name for outcome in outcomes if outcome.status == FAIL]
    print(f"\n{', '.join(failed) + ' failed' if failed else 'nothing failed'}; {report['seconds']:.0f} s; {file}")
    return 1 if failed else 0
