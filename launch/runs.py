"""Runs of torchtitan's trainer for the quickstart: start one, read its log as it is written, keep what it said."""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = r"[-+0-9.einfaEINFA]+"
_STEP = re.compile(rf"(?<!validate )step:\s*(\d+)\s+loss:\s*({_NUMBER})\s.*?tps:\s*([\d,]+)")
_VALIDATION = re.compile(rf"validate step:\s*(\d+)\s+loss:\s*({_NUMBER})\s")


class RunFailed(Exception):
    """A run that did not do what it should; the message says what happened and where to look."""


@dataclass
class Run:
    """What one run of the trainer said.

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
        line = _ANSI.sub("", line).rstrip("\n")
        self.lines.append(line)
        if found := _VALIDATION.search(line):
            self.validation[int(found[1])] = float(found[2])
        elif found := _STEP.search(line):
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


def train(
    name: str,
    settings: dict[str, Any],
    *,
    ranks: int,
    out: Path,
    config: Path,
    env: dict[str, str] | None = None,
    on_step: Callable[[Run, int], None] | None = None,
    time_limit: float = 900,
) -> Run:
    """Run torchtitan's trainer through launch/run_train.sh and wait for it.

    Args:
        name: the run's name: its log is `out/name.log`, its dump folder `out/name`.
        settings: the trainer's settings by name, such as `{"training.steps": 10, "checkpoint.enable": True}`.
        ranks: number of processes.
        out: folder of all runs.
        config: TOML file.
        env: more environment variables.
        on_step: called with the run and the step whenever a training step is reported.
        time_limit: seconds after which the run is stopped and counts as failed.

    Raises:
        RunFailed: it ended with an error, took too long, or reported no step where `on_step` waits for some.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = Run(ranks, out / f"{name}.log")
    script = ROOT / "launch" / "run_train.sh"
    command = ["bash", str(script), *arguments({"job.dump_folder": out / name, **settings})]
    # The Python that runs this file, whatever virtual environment the user has active.
    environment = {**os.environ, "PYTHON": sys.executable, "NGPU": str(ranks), "LOG_RANK": "0"}
    environment |= {"CONFIG_FILE": str(config), **(env or {})}
    environment.pop("COMM_MODE", None)
    late = threading.Event()
    with open(run.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def stop() -> None:
            late.set()
            _end(process)

        timer = threading.Timer(time_limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                step = run.read(line)
                if step is not None and on_step is not None:
                    on_step(run, step)
            status = process.wait()
        finally:
            timer.cancel()
            _end(process)  # an interrupt or an error here must not leave ranks behind
    if late.is_set():
        raise RunFailed(f"{name} was still running after {time_limit:.0f} seconds and was stopped; log: {run.log}")
    if status != 0:
        raise RunFailed(f"{name} ended with status {status}.\n{_reason(run.lines)}\nlog: {run.log}")
    if on_step is not None and not run.losses:
        raise RunFailed(f"{name} ended without reporting a single step; log: {run.log}")
    return run


def _end(process: "subprocess.Popen[str]") -> None:
    """End a run. Its ranks are in sessions of their own: torchrun takes them along. TERM lets them save, INT not."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, 45), (signal.SIGINT, 45), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


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


def _reason(lines: list[str]) -> str:
    """The exception lines of a failed run, or its last lines where it raised none."""
    plain = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in lines]
    errors = [line for line in plain if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    own = [line for line in errors if "ChildFailedError" not in line]
    return "\n".join(dict.fromkeys(own)) if own else "\n".join(lines[-12:])


def optimizer_bytes(checkpoint: Path) -> tuple[int, int, int]:
    """From the metadata of a checkpoint's tensors: bytes of optimizer state in all, bytes of second moments among
    them, and the number of parameters they belong to."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    total = seconds = parameters = 0
    for name, entry in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
        if not name.startswith("optimizer.state.") or not isinstance(entry, TensorStorageMetadata):
            continue
        size = entry.size.numel() * entry.properties.dtype.itemsize
        total += size
        seconds += size * name.endswith(".exp_avg_sq")
        parameters += entry.size.numel() * name.endswith(".exp_avg")
    if not parameters:
        raise RunFailed(f"The checkpoint {checkpoint} holds no optimizer state.")
    return total, seconds, parameters
