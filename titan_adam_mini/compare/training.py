"""One run of torchtitan's trainer in its own folder: started, followed through its log, stopped.

The trainer writes to files and holds the folder's lock. It survives if the command is killed; the next command then
waits for it.
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

LOCK, LOG, TENSORBOARD, CHECKPOINTS = "lock", "train.log", "tb", "checkpoint"
"""Names in a run's folder. The lock's content is the trainer's process id and the variables it was given, as JSON."""

FEATURES = {f"TITAN_ADAM_MINI_{name}": "1" for name in ("CPU", "SIGNALS", "ONE_CURVE", "SAME_VALIDATION")}
"""Changes to torchtitan that the runs need, as environment variables: docs/torchtitan.md."""

_STOP_TIMEOUT, _POLL = 45.0, 0.1
"""Seconds for a trainer to save and exit, and between two checks whether it has."""


class Training:
    """A trainer running in a folder, started by this command or an earlier one.

    Args:
        folder: all files of the run are written below it.
        arguments: torchtitan's command line, without the folder.
        ranks: number of processes; one runs without torchrun.
        loss_rank: the rank whose output is logged.
        variables: additional environment variables.
        recorded_steps: number of steps with recorded figures; the run resumes from no later checkpoint.

    Attributes:
        adopted: whether the trainer was started by an earlier command, which was killed.
        variables: those of the trainer, also if it is adopted.
        pid: of the trainer, or of its torchrun; 0 if an earlier command was killed before it wrote it down.
        step, loss: the latest in its log.
        resumed_step: the step of the checkpoint that it resumes from; 0 for none.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        ranks: int,
        loss_rank: int,
        variables: Mapping[str, str],
        recorded_steps: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.variables, self.pid = folder, variables, 0
        self.step, self.loss = 0, ""
        self._log_start = self._log_position = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = open(folder / LOCK, "a+")  # noqa: SIM115
        self.adopted = not self._lock_folder()
        if self.adopted:
            if trainer := running_trainer(folder):
                self.pid, self.variables = trainer
            return
        self.resumed_step = _prepare(folder, recorded_steps)
        self._log_start = self._log_position = (folder / LOG).stat().st_size if (folder / LOG).exists() else 0
        environment = {**os.environ, **variables, "LOG_RANK": str(loss_rank), "PYTHONUNBUFFERED": "1", **FEATURES}
        if ranks == 1:
            command, own = without_torchrun()
            environment |= own
        else:
            command = torchrun(ranks, f"--local-ranks-filter={loss_rank}", "--role=rank", "--tee=3")
        self._lock.truncate(0)  # before the trainer holds the lock too, so that nobody reads an earlier trainer's pid
        with open(folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [*command, *arguments, "--job.dump_folder", str(folder)],
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
        """Whether the trainer is running; reads what it has logged since the last call."""
        running = self._alive()  # before reading, so that nothing is missed when it has exited
        self._follow()
        return running

    @property
    def diverged(self) -> bool:
        """Whether its latest loss is not finite."""
        return self.loss.strip("+-").lower() in ("nan", "inf")

    @property
    def failure(self) -> str:
        """Why the trainer failed, after its exit; "" if it did not fail or was adopted."""
        if self._process is None or self._process.returncode == 0:
            return ""
        lines = [plain(line).strip() for line in self._log(self._log_start).decode(errors="replace").splitlines()]
        reason = (errors_in(lines) or lines or ["it printed nothing"])[-1]
        return f"{reason} (status {self._process.returncode}; log: {self.folder / LOG})"

    def request_stop(self) -> None:
        """Send SIGTERM, without waiting: a run with checkpoints saves before it exits."""
        if self.pid and self._alive():
            # Only to the process, not its group: if the data loader's workers were killed too, the trainer would fail
            # before it saves. torchrun forwards the signal to its ranks.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Request a stop, wait, and kill the trainer if it does not exit in time."""
        self.request_stop()
        until = time.monotonic() + _STOP_TIMEOUT
        while self.pid and self._alive():
            if time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            time.sleep(_POLL)

    def close(self) -> None:
        """Release the folder's lock, after the exit."""
        self._lock.close()

    def _alive(self) -> bool:
        return self._process.poll() is None if self._process is not None else not self._lock_folder()

    def _lock_folder(self) -> bool:
        """Lock the folder; False if the trainer of an earlier command holds the lock."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _follow(self) -> None:
        lines, newline, _ = self._log(self._log_position).rpartition(b"\n")
        self._log_position += len(lines) + len(newline)
        for line in lines.decode(errors="replace").splitlines():
            if found := step_in(plain(line)):
                self.step, self.loss = found

    def _log(self, start: int) -> bytes:
        try:
            with open(self.folder / LOG, "rb") as log:
                log.seek(start)
                return log.read()
        except FileNotFoundError:
            return b""


def running_trainer(folder: Path) -> tuple[int, dict[str, str]] | None:
    """Process id and variables of the trainer that is running in a folder; (0, {}) if they were not written down."""
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


def saved_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint, of the complete ones in a run's folder."""
    found = {int(file.parent.name[5:]): file.parent for file in (folder / CHECKPOINTS).glob("step-*/.metadata")}
    return dict(sorted(found.items()))


def _prepare(folder: Path, recorded_steps: int) -> int:
    """Remove checkpoints after `recorded_steps`, and everything if none remains. Returns the step to resume from."""
    usable = [step for step in saved_checkpoints(folder) if 0 < step <= recorded_steps]
    for path in folder.iterdir():
        if path.name == CHECKPOINTS and usable:
            for checkpoint in path.iterdir():
                if checkpoint.name not in [f"step-{step}" for step in usable]:
                    shutil.rmtree(checkpoint)
        elif path.name != LOCK and not usable:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return max(usable, default=0)
