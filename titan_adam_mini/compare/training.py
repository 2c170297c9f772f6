"""One run of torchtitan's trainer in a folder of its own: started, watched through its log, ended.

The trainer writes into files and holds the folder's lock. It outlives a command that is killed, and the next one waits
for it where it stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..tools.trainer import errors_in, plain, step_in, torchrun, without_torchrun

LOCK, LOG, BOARD, CHECKPOINTS = "lock", "train.log", "tb", "checkpoint"
"""Names in a run's folder. The lock's content is the trainer's process id and the variables it was given, as JSON."""

FEATURES = {f"TITAN_ADAM_MINI_{name}": "1" for name in ("CPU", "SIGNALS", "ONE_CURVE", "SAME_VALIDATION")}
"""Changes to torchtitan that the runs need, as environment variables: docs/torchtitan.md."""

_PATIENCE, _LOOK = 45.0, 0.1
"""Seconds for a trainer to save and leave, and between two looks whether it has."""


class Training:
    """A trainer at work in a folder, whoever started it.

    Args:
        folder: all that the run writes goes below it.
        words: torchtitan's command line, without the folder.
        ranks: number of processes; one runs without torchrun.
        shown: the rank whose output is kept.
        variables: more environment variables.
        known: the step up to which the run's figures are on record: it goes on from a checkpoint no later than that.

    Attributes:
        adopted: whether the trainer is that of an earlier command, which was killed.
        variables: those the trainer has, whoever gave them.
        pid: of the trainer, or of its torchrun; 0 if an earlier command did not come to write it down.
        step, loss: the last that it has said.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        *,
        ranks: int,
        shown: int,
        variables: Mapping[str, str],
        known: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.variables, self.pid = folder, variables, 0
        self.step, self.loss = 0, ""
        self._begin = self._read = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = open(folder / LOCK, "a+")  # noqa: SIM115
        self.adopted = not self._locked()
        if self.adopted:
            if told := at_work(folder):
                self.pid, self.variables = told
            return
        self.goes_on_from = _prepare(folder, known)
        self._begin = self._read = (folder / LOG).stat().st_size if (folder / LOG).exists() else 0
        environment = {**os.environ, **variables, "LOG_RANK": str(shown), "PYTHONUNBUFFERED": "1", **FEATURES}
        if ranks == 1:
            command, own = without_torchrun()
            environment |= own
        else:
            command = torchrun(ranks, f"--local-ranks-filter={shown}", "--role=rank", "--tee=3")
        self._lock.truncate(0)  # before the trainer holds it too: it may not be taken for an earlier one
        with open(folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [*command, *words, "--job.dump_folder", str(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
        self.pid = self._process.pid
        self._lock.write(json.dumps([self.pid, dict(variables)]))
        self._lock.flush()

    def running(self) -> bool:
        """Whether it still is; reads what it has said since the last call."""
        running = self._alive()  # asked first: what the log holds after the end is everything
        self._follow()
        return running

    @property
    def diverged(self) -> bool:
        """Whether it has said a loss that is no finite number."""
        return self.loss.strip("+-").lower() in ("nan", "inf")

    @property
    def failure(self) -> str:
        """What went wrong, "" if nothing did as far as this command can know; after the end."""
        if self._process is None or self._process.returncode == 0:
            return ""
        lines = [plain(line).strip() for line in self._log(self._begin).decode(errors="replace").splitlines()]
        told = (errors_in(lines) or lines or ["it said nothing"])[-1]
        return f"{told} (status {self._process.returncode}; log: {self.folder / LOG})"

    def ask(self) -> None:
        """Ask it to end, without waiting: a run that keeps checkpoints saves first."""
        if self.pid and self._alive():
            # The process alone: its data loader's workers, killed beside it, would make it fail before it saves, and
            # torchrun hands the signal on to its ranks.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def end(self) -> None:
        """Ask it to end, wait, and kill it if it does not."""
        self.ask()
        until = time.monotonic() + _PATIENCE
        while self.pid and self._alive():
            if time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            time.sleep(_LOOK)

    def close(self) -> None:
        """Let go of the folder, after the end."""
        self._lock.close()

    def _alive(self) -> bool:
        return self._process.poll() is None if self._process is not None else not self._locked()

    def _locked(self) -> bool:
        """Whether the folder is this process's, or that of the trainer it started."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _follow(self) -> None:
        whole = self._log(self._read).rpartition(b"\n")
        self._read += len(whole[0]) + len(whole[1])
        for line in whole[0].decode(errors="replace").splitlines():
            if found := step_in(plain(line)):
                self.step, self.loss = found

    def _log(self, begin: int) -> bytes:
        try:
            with open(self.folder / LOG, "rb") as log:
                log.seek(begin)
                return log.read()
        except FileNotFoundError:
            return b""


def at_work(folder: Path) -> tuple[int, dict[str, str]] | None:
    """Process id and variables of the trainer that is at work in a folder; (0, {}) if they are not written down."""
    if not (folder / LOCK).is_file():
        return None
    with open(folder / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid, variables = json.loads(lock.read() or "[0, {}]")
            return pid, variables
    return None


def steps_saved(folder: Path) -> dict[int, Path]:
    """step -> checkpoint, of the whole ones in a run's folder."""
    found = {int(one.parent.name[5:]): one.parent for one in (folder / CHECKPOINTS).glob("step-*/.metadata")}
    return dict(sorted(found.items()))


def _prepare(folder: Path, known: int) -> int:
    """Leave what a start can go on from: the checkpoints up to the step `known`, or nothing. Returns that step."""
    kept = [step for step in steps_saved(folder) if 0 < step <= known]
    for one in folder.iterdir():
        if one.name == CHECKPOINTS and kept:
            for checkpoint in one.iterdir():
                if checkpoint.name not in [f"step-{step}" for step in kept]:
                    shutil.rmtree(checkpoint)
        elif one.name != LOCK and not kept:
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
    return max(kept, default=0)
