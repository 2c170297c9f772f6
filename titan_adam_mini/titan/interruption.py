"""What a run with the feature "signals" has heard, when all its ranks leave, and what it writes down about itself.

SIGTERM and SIGUSR1, on any rank, ask a run to end. It saves everything, at one step on all ranks, and ends with exit
code 75 (``SAVED``); the same command goes on from there. A signal in the last step changes nothing. Environment
variables, read as the trainer starts:

    TITAN_ADAM_MINI_LEAD_SECONDS    seconds between the signal and the end that the launcher allows: a save that takes
                                    more than half of it is warned of. Unset: nobody knows, no warning.
    TITAN_ADAM_MINI_HANG_SECONDS    a process in which for so long no step and no load or save began or ended, counted
                                    from the start, ends with exit code 76 (``STUCK``) and shows its stacks. Unset or
                                    0: none does.
    TITAN_ADAM_MINI_PROGRESS        a file that rank 0 writes, whole at any moment, a JSON object:
                                    "first": the step that was loaded, 0 if none was; "step": the last finished one;
                                    "saved": the last one in this run's folder with everything in it, or null;
                                    "time": seconds since 1970. Written after the load, the first step, every save and
                                    at the end, and every five seconds.
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
"""Exit code of a run that left on a signal with everything saved (EX_TEMPFAIL: start again to go on)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

VARIABLES = tuple(f"TITAN_ADAM_MINI_{name}" for name in ("LEAD_SECONDS", "HANG_SECONDS", "PROGRESS"))
_LEAD, _HANG, _PROGRESS = VARIABLES

_current: "Interruption | None" = None


def current() -> "Interruption | None":
    """That of the run in this process; None where no trainer has started one."""
    return _current


def start() -> None:
    """Listen from here on. Raises ValueError for an environment variable that is no number of seconds."""
    global _current
    _current = Interruption()


class Interruption:
    """What this rank of a run has heard, and what it does about it. The checkpointer calls the methods."""

    def __init__(self) -> None:
        self._lead = _seconds(_LEAD)
        hang = _seconds(_HANG)
        self._watchdog = Watchdog(hang) if hang else None
        file = os.environ.get(_PROGRESS)
        self._progress = _Progress(Path(file)) if file and os.environ.get("RANK", "0") == "0" else None
        self._agreement: Agreement | None = None
        self._heard = 0
        self._warned = 0.0
        self._reason = ""
        self._former: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python hears signals in no other
            for one in SIGNALS:
                self._former[one] = signal.signal(one, self._hear)
                signal.siginterrupt(one, False)  # libraries in C need not know

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = number

    def give_up(self) -> None:
        """This run saves nothing: signals do again what they did before, one that was heard already included."""
        for one, former in self._former.items():
            signal.signal(one, signal.SIG_DFL if former is None else former)
        self._former = {}
        log_on_rank_0(
            logging.INFO, "This run saves no checkpoints: SIGTERM and SIGUSR1 end it as ever, with nothing saved."
        )
        if self._heard:
            signal.raise_signal(self._heard)

    def alive(self, step: int) -> None:
        """A step boundary begins or ends here."""
        if self._watchdog is not None:
            self._watchdog.passed(step)

    def begin(self, step: int, saved: int | None) -> bool:
        """Before the first step; on all ranks at once.

        Args:
            step: the step that was loaded, 0 if none was.
            saved: the step of the checkpoint that was loaded from this run's own folder.

        Returns:
            Whether a rank has heard a signal, so that the run is to leave at once.
        """
        if self._progress is not None:
            self._progress.begin(step, saved)
        self.alive(step)
        if not self._former:
            return False
        heard = gathered(self._heard)
        if len(heard) > 1 and not any(heard):
            with failing_together("listen for signals on other ranks"):
                store = dist.PrefixStore("titan_adam_mini", _get_default_store()).clone()
                self._agreement = Agreement(store, dist.get_rank(), len(heard), step)
        if any(heard):
            start = "from the beginning" if saved is None else f"from the checkpoint of step {saved}"
            self._decide(max(heard), f"before the first step, with nothing new to save: the next start goes on {start}")
        return any(heard)

    def exits(self, step: int, last_step: bool) -> bool:
        """As a step ends: whether all ranks are to save and leave after it."""
        self.alive(step)
        if not self._former:
            return False
        if last_step:  # the run ends by itself: nothing is to disturb that
            self._ignore()
            return False
        heard = self._heard if self._agreement is None else self._agreement.exits(step, self._heard)
        if heard:
            self._decide(heard, f"after step {step}, with everything saved")
        return heard != 0

    def saved(self, step: int, seconds: float) -> None:
        """A save with everything is whole, and took this long; from any thread."""
        if self._progress is not None:
            self._progress.saved(step)
        if self._lead is None or self._lead >= 2 * seconds or seconds <= self._warned:
            return
        self._warned = seconds
        log_on_rank_0(
            logging.WARNING,
            f"Saving step {step} took {seconds:.1f} seconds, and {self._lead:g} pass between a signal and the end "
            f"({_LEAD}), less than twice as many: ask for the signal {math.ceil(2 * seconds)} seconds or more before "
            "the end (Slurm: --signal), and set this variable to it.",
        )

    def passed(self, step: int, last_step: bool) -> None:
        """As the next step begins."""
        if self._progress is not None:
            self._progress.finished(step, last_step)
        self.alive(step)

    def exit(self, trainer: Any, seconds: float = 0.0) -> NoReturn:
        """Close the trainer and raise SystemExit; on all ranks at once.

        Args:
            trainer: torchtitan's.
            seconds: how long saving everything took; 0 if there was nothing to save.
        """
        took = f" ({seconds:.1f} seconds)" if seconds else ""
        log_on_rank_0(
            logging.WARNING, f"{self._reason}{took}. Exit code {SAVED}: start again with the same command to go on."
        )
        trainer.close()
        if self._agreement is not None:
            # The first rank that is gone has the launcher end the others, whatever they are closing.
            self._agreement.meet()
            self._agreement.close()
        dist.destroy_process_group()
        raise SystemExit(SAVED)

    def _decide(self, number: int, how: str) -> None:
        self._ignore()
        self._reason = f"{signal.Signals(number).name}: leaving {how}"

    def _ignore(self) -> None:
        # Handlers are gone before the interpreter is; this stays.
        for one in self._former:
            signal.signal(one, signal.SIG_IGN)


class _Progress:
    """The file that says how far a run is; see the head of this module."""

    _EVERY = 5.0
    """Seconds between two writings that nothing else asks for."""

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
        """From any thread, and an older save may come last."""
        with self._lock:
            self._step, self._saved = max(step, self._step), max(step, self._saved or 0)
        self.write()

    def write(self) -> None:
        with self._lock:
            content = {"first": self._first, "step": self._step, "saved": self._saved, "time": time.time()}
            self._written = time.monotonic()
            try:
                atomic_write(self._file, json.dumps(content) + "\n", sync=False)  # every few seconds, between two steps
            except OSError as error:  # a run is worth more than its progress file
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
        raise ValueError(f"{name} = {value!r} is no number of seconds: use 0 or more, or leave it unset")
    return seconds
