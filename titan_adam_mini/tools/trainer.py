"""torchtitan's trainer as a process: starting it, parsing its log, and stopping it.

Used by everything that starts a trainer or reads its log: `compare`, `inspect`, the scripts of launch/ and the tests.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = r"[-+\w.]+"
_STEP = re.compile(
    rf"(?<!validate )step:\s*(\d+)\s+loss:\s*({_NUMBER})(?:\s+grad_norm:\s*({_NUMBER}))?(?:\s.*?tps:\s*([\d,]+))?"
)
_PEAK = re.compile(r"peak active: ([\d.]+)GiB reserved: ([\d.]+)GiB")
_VALIDATION = re.compile(rf"validate step:\s*(\d+)\s+loss:\s*({_NUMBER})\s")
_ERROR = re.compile(r"(?:\[\w+\]:\s*)*([\w.]*(?:Error|Exception|Interrupt)\b.*)")
_STOP_TIMEOUT = 45.0
"""Seconds for a trainer to save and exit."""


class RunFailed(Exception):
    """A run failed; the message has the reason and the place of the log."""


def module() -> str:
    """The module that trains: the environment's TRAIN_FILE, as in launch/run_train.sh, or torchtitan's own."""
    return os.environ.get("TRAIN_FILE") or "torchtitan.train"


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command that starts `ranks` trainers, without their arguments."""
    # With port 0 the rendezvous chooses a free one, so that two runs on a machine never conflict.
    own = [f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", *own, *options, "-m", module()]


def without_torchrun() -> tuple[list[str], dict[str, str]]:
    """The command that starts a single trainer, without its arguments, and the environment variables it needs."""
    # The only process is the rendezvous host itself, so any free port will do.
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return [sys.executable, "-m", module()], {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the trainer's command line; a boolean that is False becomes `--section.no-name`."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            section, _, switch = name.rpartition(".")
            words.append(f"--{section}.no-{switch}")
        else:
            words += [f"--{name}", str(value)]
    return words


def plain(line: str) -> str:
    """A line of a log without ANSI colours."""
    return _ANSI.sub("", line).rstrip("\n")


def step_in(line: str) -> tuple[int, str] | None:
    """Step and training loss of a log line without colours; None if it does not have them."""
    match = _STEP.search(line)
    return (int(match[1]), match[2]) if match else None


def errors_in(lines: Iterable[str]) -> list[str]:
    """The exceptions in a log's lines, in order, without torchrun's own."""
    errors = [match[1] for line in lines if (match := _ERROR.match(plain(line).strip()))]
    return [error for error in errors if "ChildFailedError" not in error]


def end(process: subprocess.Popen[Any]) -> None:
    """Stop a run that was started in its own session, and wait for it.

    Its ranks are in sessions of their own and are stopped by torchrun. SIGTERM lets them save, SIGINT does not.
    """
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, _STOP_TIMEOUT), (signal.SIGINT, _STOP_TIMEOUT), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


@dataclass
class Run:
    """The output of one run of the trainer.

    Attributes:
        ranks: number of processes.
        log: file with its full output.
        losses, grad_norms: training loss and norm of the gradients, by step, over all ranks.
        validation: validation loss, by step.
        rates: tokens per second and rank, by step, as torchtitan reports them.
        peaks: largest memory in use and reserved, in GiB; NaN if not reported.
        lines: its full output, without colours.
    """

    ranks: int
    log: Path
    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    rates: dict[int, int] = field(default_factory=dict)
    peaks: tuple[float, float] = (math.nan, math.nan)
    lines: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, log: Path, ranks: int) -> Run:
        """The run of a log file."""
        run = cls(ranks, log)
        for line in log.read_text(errors="replace").splitlines():
            run.read(line)
        return run

    def read(self, line: str) -> int | None:
        """Parse one line of output; returns the step if it reports a training step."""
        line = plain(line)
        self.lines.append(line)
        if match := _VALIDATION.search(line):
            self.validation[int(match[1])] = float(match[2])
        elif (match := _STEP.search(line)) and match[4]:
            step = int(match[1])
            self.losses[step] = float(match[2])
            self.grad_norms[step] = float(match[3] or "nan")
            self.rates[step] = int(match[4].replace(",", ""))
            return step
        elif match := _PEAK.search(line):
            active, reserved = self.peaks
            # The comparison with NaN is false: the first peak replaces it.
            self.peaks = (max(float(match[1]), active), max(float(match[2]), reserved))
        return None

    @property
    def error(self) -> str:
        """The exceptions of a failed run, or its last lines if there are none."""
        return "\n".join(dict.fromkeys(errors_in(self.lines)) or self.lines[-12:])

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps of all ranks together, without the first five steps, which allocate; NaN if none."""
        rates = [rate for step, rate in self.rates.items() if step > 5] or list(self.rates.values())
        return statistics.median(rates) * self.ranks if rates else math.nan
