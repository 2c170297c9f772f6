"""The attempts of one training run on Slurm: the outcome of each, and whether the job is requeued.

    attempts.py begin OUTPUTS             prints the number of the new attempt
    attempts.py end OUTPUTS ATTEMPT ...   reports why it ended, on stderr; prints "STATUS requeue" or "STATUS stop"

Everything is in files under OUTPUTS, the run's dump folder:

    attempts.tsv              one line per attempt, written when it ends or, if that failed, when the next begins
    attempts/K/begun.json     job, start time, nodes
    attempts/K/progress.json  from the trainer: the step it resumed from, the last step, the last saved step
    attempts/K/failures-*.json  from launch/torchrun.py of each node: its failed ranks
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from titan_adam_mini.files import atomic_write

SAVED = 75
"""The trainer's exit status after it saved on a signal (titan_adam_mini/titan/interruption.py)."""

STUCK = 76
"""The trainer's exit status after a hang."""

REFUSED = 78
"""Exit status if the plan reports that the run cannot start, or another job trains in its folder."""

EARLY_FAILURES = 3
"""Number of consecutive failures before the first step after which the job is not requeued."""

_REFUSALS = (
    r"(ValueError|NotImplementedError|AssertionError|ModuleNotFoundError|ImportError|TypeError|AttributeError): "
)
"""Errors that would recur if they occur before the first step: the configuration or the installation is wrong."""

_FOLLOWING = (
    r"Connection closed|Connection reset|Broken pipe|DistNetworkError|DistBackendError|DistStoreError|Gloo|NCCL"
)
"""Errors of a rank that result from the failure of another one."""

COLUMNS = ("attempt", "job", "restart", "begun", "ended", "nodes", "from", "step", "saved", "status", "reason", "then")


@dataclass
class Attempt:
    """One line of attempts.tsv."""

    attempt: int
    job: str
    restart: int
    nodes: str
    begun: float
    ended: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    status: int | None = None
    reason: str = ""
    then: str = ""
    signalled: bool = False

    @property
    def stepped(self) -> bool:
        """Whether it finished at least one step."""
        return self.progress.get("step", 0) > self.progress.get("first", 0)

    @property
    def failed_early(self) -> bool:
        """Whether it failed without a signal before its first step."""
        return self.status not in (None, 0, SAVED) and not self.signalled and not self.stepped


def decide(history: list[Attempt], *, refused: bool, limit: int) -> tuple[bool, str]:
    """Whether a job that has just ended is requeued, and if not, the reason.

    Args:
        history: all attempts so far, the last one being the one that ended.
        refused: whether its configuration was refused in the last attempt.
        limit: how often the job may be requeued.
    """
    last = history[-1]
    if last.status == 0:
        return False, "training is complete"
    # If the job has trained before, the configuration is right: a node may lack a file system or a library.
    if refused and not any(attempt.stepped for attempt in history if attempt.job == last.job):
        return False, "the configuration is refused and would be refused again"
    own = [attempt for attempt in history if attempt.status is not None and attempt.job == last.job]
    if len(own) >= EARLY_FAILURES and all(attempt.failed_early for attempt in own[-EARLY_FAILURES:]):
        return False, f"{EARLY_FAILURES} attempts in a row failed before their first step"
    if last.restart >= limit:
        return False, f"the job was requeued {last.restart} times, which is its limit (MAX_REQUEUES)"
    return True, ""


def first_failure(failures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The failure that probably caused the others: earliest, but not of a rank that lost its peers, if possible."""
    return min(
        failures, key=lambda failure: (bool(re.search(_FOLLOWING, failure["error"])), failure["time"]), default=None
    )


def reason_of(status: int, first: dict[str, Any] | None, signalled: bool) -> str:
    """A short reason why an attempt ended."""
    if status == 0:
        return "complete"
    if status == REFUSED:
        return "refused by the plan"
    if status == SAVED:
        return "exited on a signal, saved"
    if status == STUCK:
        return "no step for too long"
    if signalled:
        return "ended after a signal, before it could save"
    if first is None:
        return "a node or its torchrun failed"
    error = first["error"] or f"ended with status {first['status']}"
    return f"rank {first['rank']} on {first['node']}: {error.splitlines()[0][:200]}"


class Attempts:
    """The attempts in a dump folder."""

    def __init__(self, outputs: Path) -> None:
        self.folder, self.table = outputs / "attempts", outputs / "attempts.tsv"

    def begin(self, job: str, restart: int, nodes: str) -> int:
        """Record an attempt that starts now. Raises ValueError if another job trains in this folder."""
        history = self.history()
        self._refuse(job, history)
        for attempt in history:
            if attempt.ended is None:
                last = attempt.progress.get("time", attempt.begun)
                self._write(
                    attempt, ended=last, reason="ended without a report: node failure, pre-emption or cancelled"
                )
        number = max((attempt.attempt for attempt in history), default=0) + 1
        while not self._take(number):
            number += 1
        file = self._store(Attempt(number, job, restart, nodes, time.time()))
        try:  # of jobs that begin at the same time, the one with the lowest number wins
            self._refuse(job, [attempt for attempt in self.history() if attempt.attempt < number])
        except ValueError:
            file.unlink()
            raise
        return number

    def _refuse(self, job: str, history: list[Attempt]) -> None:
        for attempt in history:
            if attempt.ended is None and attempt.job != job and _is_alive(attempt.job):
                raise ValueError(
                    f"job {attempt.job} is training in {self.table.parent}: wait for it, cancel it (scancel "
                    f"{attempt.job}), "
                    "or give this job another name (sbatch --job-name)"
                )

    def _take(self, number: int) -> bool:
        """Create the folder of an attempt; False if another job has just created it."""
        try:
            (self.folder / str(number)).mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def end(self, number: int, status: int, *, signalled: bool, bad: str, limit: int, may: bool) -> tuple[int, bool]:
        """Record how an attempt ended; returns the exit status of training and whether the job is requeued."""
        attempt = self._read(self.folder / str(number) / "begun.json")
        attempt.signalled = signalled
        files = (self.folder / str(number)).glob("failures-*.json")
        failures = [failure for file in files for failure in _json(file) or []]
        first = first_failure(failures)
        if first is not None and status != 0:
            status = int(first["status"])
        attempt.status = status
        refused = status in (2, REFUSED) or bool(first and re.match(_REFUSALS, first["error"]))
        history = [*(earlier for earlier in self.history() if earlier.attempt < number), attempt]
        again, why = decide(history, refused=refused, limit=limit)
        if again and not may:
            again, why = False, "Slurm has cancelled it, or requeues it itself, or it was submitted with --no-requeue"
        reason = reason_of(status, first, signalled) + (f"; bad nodes: {bad}" if bad else "")
        self._write(
            attempt, ended=time.time(), reason=reason, then="requeue" if again else "stop" if may else "left to Slurm"
        )
        step, saved = attempt.progress.get("step"), attempt.progress.get("saved")
        _log(f"attempt {number} ended with status {status}: {reason}; last step {step}, last saved step {saved}")
        if first is not None and status not in (0, SAVED):
            log = self.folder / str(number) / f"rank-{first['rank']:05}.log"
            details = first["traceback"] or f"{first['error'] or 'no error message'}; the end of {log}:\n{_tail(log)}"
            _log(f"rank {first['rank']} on {first['node']} failed first:\n{details}")
        _log("requeued" if again else f"not requeued: {why}")
        return status, again

    def history(self) -> list[Attempt]:
        """All attempts, in order."""
        found = [self._read(file) for file in self.folder.glob("*/begun.json")]
        return sorted(found, key=lambda attempt: attempt.attempt)

    def _read(self, file: Path) -> Attempt:
        attempt = Attempt(**json.loads(file.read_text(encoding="utf-8")))
        attempt.progress = _json(file.parent / "progress.json") or {}
        return attempt

    def _store(self, attempt: Attempt) -> Path:
        file = self.folder / str(attempt.attempt) / "begun.json"
        atomic_write(file, json.dumps(asdict(attempt)))
        return file

    def _write(self, attempt: Attempt, *, ended: float, reason: str, then: str = "") -> None:
        """Finish an attempt: write its line in the table, then its file."""
        attempt.ended, attempt.reason, attempt.then = ended, reason, then
        new = not self.table.exists()
        values = {**asdict(attempt), "from": attempt.progress.get("first"), "begun": _date(attempt.begun)}
        values |= {"ended": _date(ended), "step": attempt.progress.get("step"), "saved": attempt.progress.get("saved")}
        cells = ["" if values[name] is None else re.sub(r"\s+", " ", str(values[name])) for name in COLUMNS]
        with open(self.table, "a", encoding="utf-8") as table:
            table.write(("\t".join(COLUMNS) + "\n" if new else "") + "\t".join(cells) + "\n")
        self._store(attempt)


def _json(file: Path) -> Any:
    """The content of a file; None if it is missing or incomplete: a full disk must not lose the job."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_alive(job: str) -> bool:
    """Whether Slurm still has a job running or waiting."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format=%i"], capture_output=True, text=True)
    return bool(asked.stdout.strip())


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if log.exists() else ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def _log(line: str) -> None:
    print(f"titan-adam-mini: {line}", file=sys.stderr, flush=True)


def begin(outputs: tyro.conf.Positional[Path], /) -> None:
    """Record that an attempt starts; prints its number."""
    env = os.environ
    restart = int(env.get("SLURM_RESTART_COUNT", "0"))
    print(Attempts(outputs).begin(env["SLURM_JOB_ID"], restart, env.get("SLURM_JOB_NODELIST", "")))


def end(
    outputs: tyro.conf.Positional[Path],
    attempt: tyro.conf.Positional[int],
    /,
    status: int,
    limit: int,
    signalled: bool = False,
    bad: str = "",
    requeue: bool = True,
) -> None:
    """Record how an attempt ended; prints the exit status of training, and "requeue" or "stop".

    Args:
        outputs: the run's dump folder.
        attempt: its number.
        status: exit status of srun.
        limit: how often the job may be requeued.
        signalled: whether a signal had asked it to exit.
        bad: nodes that the next attempt must not use.
        requeue: whether Slurm allows the job to be requeued.
    """
    status, again = Attempts(outputs).end(attempt, status, signalled=signalled, bad=bad, limit=limit, may=requeue)
    print(status, "requeue" if again else "stop")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"begin": begin, "end": end})
    except ValueError as error:
        _log(str(error))
        sys.exit(REFUSED)
    except OSError as error:  # a full disk
        _log(str(error))
        sys.exit(1)
