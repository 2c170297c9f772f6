"""torchtitan's trainer as a process: how it is started, what its log says, and how it is ended.

Whatever starts a trainer or reads one's log goes by this: `compare`, `inspect`, the scripts of launch/ and the tests.
"""

from __future__ import annotations

import contextlib
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
_STEP = re.compile(rf"(?<!validate )step:\s*(\d+)\s+loss:\s*({_NUMBER})(?:\s.*?tps:\s*([\d,]+))?")
_VALIDATION = re.compile(rf"validate step:\s*(\d+)\s+loss:\s*({_NUMBER})\s")
_ERROR = re.compile(r"(?:\[\w+\]:\s*)*([\w.]*(?:Error|Exception|Interrupt)\b.*)")
_PATIENCE = 45.0
"""Seconds for a trainer to save and leave."""


class RunFailed(Exception):
    """A run that did not do what it should; the message says what happened and where to look."""


def module() -> str:
    """What trains: the environment's TRAIN_FILE, as launch/run_train.sh has it, or torchtitan's own."""
    return os.environ.get("TRAIN_FILE") or "torchtitan.train"


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command that starts `ranks` trainers, without their arguments."""
    # Port 0 lets the rendezvous choose a free one: two runs on a machine never meet.
    own = [f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", *own, *options, "-m", module()]


def without_torchrun() -> tuple[list[str], dict[str, str]]:
    """The command that starts a single trainer, without its arguments, and the variables it needs."""
    # The only process is the one that all others would ask: a port that nobody knows will do.
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return [sys.executable, "-m", module()], {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the trainer's command line; a switch that is off is spelled `--section.no-name`."""
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
    """A line of a log without colours."""
    return _ANSI.sub("", line).rstrip("\n")


def step_in(line: str) -> tuple[int, str] | None:
    """Step and training loss, where a line without colours reports them."""
    found = _STEP.search(line)
    return (int(found[1]), found[2]) if found else None


def errors_in(lines: Iterable[str]) -> list[str]:
    """The exceptions that a log's lines tell of, in order, without torchrun's own."""
    found = [match[1] for line in lines if (match := _ERROR.match(plain(line).strip()))]
    return [one for one in found if "ChildFailedError" not in one]


def end(process: subprocess.Popen[Any]) -> None:
    """End a run, started in a session of its own, and wait for it.

    Its ranks are in sessions of their own: torchrun takes them along. TERM lets them save, INT not.
    """
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGINT, _PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


@dataclass
class Run:
    """What one run of the trainer reported.

    Attributes:
        ranks: number of processes.
        log: file with everything it printed.
        losses: training loss of every step, over all ranks.
        validation: loss on held-out documents, by step.
        rates: tokens per second and rank, by step, as torchtitan reports them.
        lines: everything it printed, without colours.
    """

    ranks: int
    log: Path
    losses: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    rates: dict[int, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def read(self, line: str) -> int | None:
        """Take one line of output; returns the step if it reports a training step."""
        line = plain(line)
        self.lines.append(line)
        if found := _VALIDATION.search(line):
            self.validation[int(found[1])] = float(found[2])
        elif (found := _STEP.search(line)) and found[3]:
            step = int(found[1])
            self.losses[step] = float(found[2])
            self.rates[step] = int(found[3].replace(",", ""))
            return step
        return None

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps, all ranks together, without the first five steps, which allocate."""
        rates = [rate for step, rate in self.rates.items() if step > 5] or list(self.rates.values())
        return statistics.median(rates) * self.ranks
