"""The feature "signals": signal handling, the decision when all ranks exit, and the progress file.

SIGTERM or SIGUSR1 on any rank asks a run to exit. All ranks save a full checkpoint after the same step and exit with
code 75 (``SAVED``); the same command resumes from there. A signal in the last step has no effect. Environment
variables, read when the trainer starts:

    TITAN_ADAM_MINI_LEAD_SECONDS    seconds between the signal and the time at which the launcher kills the run: a save
                                    that takes more than half of it logs a warning. Unset: no warning.
    TITAN_ADAM_MINI_HANG_SECONDS    if no step, load or save begins or ends for this many seconds, the process prints
                                    its stacks and exits with code 76 (``STUCK``). Unset or 0: never.
    TITAN_ADAM_MINI_PROGRESS        a JSON file written atomically by rank 0: "first": the step that was loaded, or 0;
                                    "step": the last finished step; "saved": the last step with a full checkpoint in
                                    this run's folder, or null; "time": seconds since 1970. Written after the load, the
                                    first step, every save and the last step, and every five seconds.
"""

import json
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from titan_adam_mini.files import atomic_write
from titan_adam_mini.private import _get_default_store
from titan_adam_mini.titan.agreement import Agreement
from titan_adam_mini.titan.all_ranks import failing_together, gathered
from titan_adam_mini.titan.log import log_on_rank_0
from titan_adam_mini.titan.watchdog import STUCK, Watchdog

__all__ = ["SAVED", "STUCK", "VARIABLES", "Interruption", "current", "start"]

SAVED = 75
"""Exit code of a run that exited on a signal with a full checkpoint (EX_TEMPFAIL: start it again to resume)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

VARIABLES = tuple(f"TITAN_ADAM_MINI_{name}" for name in ("LEAD_SECONDS", "HANG_SECONDS", "PROGRESS"))
_LEAD, _HANG, _PROGRESS = VARIABLES

_current: "Interruption | None" = None


def current() -> "Interruption | None":
    """The instance of this process; None if no trainer has started one."""
    return _current


def start() -> None:
    """Start handling signals. Raises ValueError for an environment variable that is not a number of seconds."""
    global _current
    _current = Interruption()


class Interruption:
    """The signals received by this rank, and the reaction to them. The checkpointer calls the methods."""

    def __init__(self) -> None:
        self._lead = _seconds(_LEAD)
        hang = _seconds(_HANG)
        self._watchdog = Watchdog(hang) if hang else None
        file = os.environ.get(_PROGRESS)
        self._progress = _Progress(Path(file)) if file and os.environ.get("RANK", "0") == "0" else None
        self._agreement: Agreement | None = None
        self._received = 0
        self._warned = 0.0
        self._reason = ""
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
                signal.siginterrupt(number, False)  # do not interrupt system calls of C libraries

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def restore_handlers(self) -> None:
        """For a run without checkpoints: restore the previous signal handlers, and re-raise a signal already
        received."""
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}
        log_on_rank_0(
            logging.INFO, "This run saves no checkpoints: SIGTERM and SIGUSR1 end it as usual, without saving."
        )
        if self._received:
            signal.raise_signal(self._received)

    def alive(self, step: int) -> None:
        """Report a step boundary to the watchdog."""
        if self._watchdog is not None:
            self._watchdog.passed(step)

    def begin(self, step: int, saved: int | None) -> bool:
        """Called before the first step, on all ranks.

        Args:
            step: the step that was loaded, 0 if none was.
            saved: the step of the checkpoint, if it was loaded from this run's own folder.

        Returns:
            Whether a rank has received a signal, so that the run must exit immediately.
        """
        if self._progress is not None:
            self._progress.begin(step, saved)
        self.alive(step)
        if not self._previous:
            return False
        received = gathered(self._received)
        if len(received) > 1 and not any(received):
            with failing_together("listen for signals on other ranks"):
                store = dist.PrefixStore("titan_adam_mini", _get_default_store()).clone()
                self._agreement = Agreement(store, dist.get_rank(), len(received), step)
        if any(received):
            start = "from the beginning" if saved is None else f"from the checkpoint of step {saved}"
            self._decide(
                max(received), f"before the first step, with nothing new to save: the next start resumes {start}"
            )
        return any(received)

    def should_exit(self, step: int, last_step: bool) -> bool:
        """Called after a step: whether all ranks must save and exit now."""
        self.alive(step)
        if not self._previous:
            return False
        if last_step:  # the run ends anyway: ignore signals
            self._ignore()
            return False
        received = self._received if self._agreement is None else self._agreement.should_exit(step, self._received)
        if received:
            self._decide(received, f"after step {step}, with a full checkpoint")
        return received != 0

    def saved(self, step: int, seconds: float) -> None:
        """Report a completed full save and its duration; from any thread."""
        if self._progress is not None:
            self._progress.saved(step)
        if self._lead is None or self._lead >= 2 * seconds or seconds <= self._warned:
            return
        self._warned = seconds
        log_on_rank_0(
            logging.WARNING,
            f"Saving step {step} took {seconds:.1f} seconds, more than half of the {self._lead:g} seconds between a "
            f"signal and the end ({_LEAD}): request the signal at least {math.ceil(2 * seconds)} seconds before the "
            "end (Slurm: --signal), and set this variable to that.",
        )

    def passed(self, step: int, last_step: bool) -> None:
        """Called when the next step begins."""
        if self._progress is not None:
            self._progress.finished(step, last_step)
        self.alive(step)

    def exit(self, trainer: Any, seconds: float = 0.0) -> NoReturn:
        """Close the trainer and raise SystemExit; called on all ranks.

        Args:
            trainer: torchtitan's.
            seconds: the duration of the final save; 0 if there was nothing to save.
        """
        took = f" ({seconds:.1f} seconds)" if seconds else ""
        log_on_rank_0(
            logging.WARNING, f"{self._reason}{took}. Exit code {SAVED}: start again with the same command to resume."
        )
        trainer.close()
        if self._agreement is not None:
            # Once the first rank exits, the launcher kills the others, even if they are still closing files.
            self._agreement.barrier()
            self._agreement.close()
        dist.destroy_process_group()
        raise SystemExit(SAVED)

    def _decide(self, number: int, how: str) -> None:
        self._ignore()
        self._reason = f"{signal.Signals(number).name}: exiting {how}"

    def _ignore(self) -> None:
        # Python handlers end before the interpreter does; SIG_IGN stays.
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)


class _Progress:
    """The progress file; see the module docstring."""

    _EVERY = 5.0
    """Seconds between periodic writes."""

    def __init__(self, file: Path) -> None:
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{_PROGRESS} = {file}: there is no folder {file.absolute().parent}")
        self._file, self._lock, self._written = file, threading.Lock(), -math.inf
        self._first = self._step = 0
        self._saved: int | None = None

    def begin(self, step: int, saved: int | None) -> None:
        self._first = self._step = step
        self._saved = saved
        self.write()

    def finished(self, step: int, last_step: bool) -> None:
        self._step = step
        if last_step or step == self._first + 1 or time.monotonic() >= self._written + self._EVERY:
            self.write()

    def saved(self, step: int) -> None:
        """Called from any thread; an older save may finish last."""
        with self._lock:
            self._step, self._saved = max(step, self._step), max(step, self._saved or 0)
        self.write()

    def write(self) -> None:
        with self._lock:
            content = {"first": self._first, "step": self._step, "saved": self._saved, "time": time.time()}
            self._written = time.monotonic()
            try:
                atomic_write(
                    self._file, json.dumps(content) + "\n", sync=False
                )  # no sync: written every few seconds, between two steps
            except OSError as error:  # do not end a run for its progress file
                log_on_rank_0(logging.WARNING, f"{_PROGRESS}: {error}")


def _seconds(name: str) -> float | None:
    """An environment variable; None if it is not set. Raises ValueError."""
    value = os.environ.get(name, "")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} = {value!r} is not a number of seconds: use 0 or more, or leave it unset")
    return seconds
