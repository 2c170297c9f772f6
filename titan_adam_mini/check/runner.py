"""Runs one stage in a subprocess with a deadline, and ends all its descendants."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"
TAIL = 15
"""Number of lines kept of a failed stage's output."""
GRACE = 8.0
"""Seconds for a stage that is late to end its own processes before all of them are killed."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: its name in the table, and its module in `stages`.
        limit: seconds after which it fails.
        least: minimum of remaining seconds needed to start it.
    """

    name: str
    limit: float
    least: float


@dataclass
class Outcome:
    """The outcome of a stage.

    Attributes:
        name: the stage's.
        status: PASS, FAIL or SKIPPED.
        seconds: how long it took.
        line: its result in the table.
        numbers: its measurements.
        tail: of a failed stage, the last lines of its output.
    """

    name: str
    status: str
    seconds: float
    line: str
    numbers: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def run(stage: Stage, left: float, options: dict[str, Any], out: Path) -> Outcome:
    """Run one stage with at most `left` seconds.

    Args:
        stage: which.
        left: seconds left for everything.
        options: flags of the stage's command line, and their values.
        out: folder for its log and its result.
    """
    if left < stage.least:
        return Outcome(stage.name, SKIPPED, 0.0, "no time left")
    limit = min(stage.limit, left)
    log, result = out / f"{stage.name}.log", out / f"{stage.name}.json"
    result.unlink(missing_ok=True)
    flags = {**options, "--limit": f"{limit:.0f}", "--out": out, "--result": result}
    command = [
        sys.executable,
        "-m",
        "titan_adam_mini.check",
        stage.name,
        *(str(word) for pair in flags.items() for word in pair),
    ]
    started = time.monotonic()
    status = execute(command, limit, log)
    seconds = time.monotonic() - started
    answer: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        answer = json.loads(result.read_text())
    line, numbers = answer.get("line", ""), answer.get("numbers", {})
    if status == 0 and answer.get("skipped"):
        return Outcome(stage.name, SKIPPED, seconds, line, numbers)
    if status == 0 and answer.get("passed"):
        return Outcome(stage.name, PASS, seconds, line, numbers)
    if status is None:
        line = f"still running after {limit:.0f} s, stopped{'; ' + line if line else ''}"
    elif not line:
        line = f"ended with status {status}"
    return Outcome(stage.name, FAIL, seconds, line, numbers, log.read_text(errors="replace").splitlines()[-TAIL:])


def execute(command: list[str], limit: float, log: Path, environment: dict[str, str] | None = None) -> int | None:
    """Run a command with its output in `log`; returns its exit status, or None if it was stopped after `limit` seconds.

    It and all its descendants have ended when this returns or raises.
    """
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """End a process and all its descendants, also those in other sessions (torchrun's ranks): SIGTERM first."""
    family = _descendants(process.pid)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            family |= _descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    now = _started()
    for pid, since in family.items():
        if now.get(pid, (0, ""))[1] == since:  # not another process that reused its id
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _started() -> dict[int, tuple[int, str]]:
    """(parent, start time) of every process."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = file.read_text().rpartition(")")[2].split()
            found[int(file.parent.name)] = (int(fields[1]), fields[19])
    return found


def _descendants(root: int) -> dict[int, str]:
    """Start time by process, of all below `root`."""
    everyone, family, fresh = _started(), {}, {root}
    while fresh:
        fresh = {pid for pid, (parent, _) in everyone.items() if parent in fresh and pid not in family}
        family.update({pid: everyone[pid][1] for pid in fresh})
    return family
