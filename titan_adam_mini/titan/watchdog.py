"""Ends a hanging run, and prints the stacks of all threads of every rank."""

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path

import torch

STUCK = 76
"""Exit code of a run that passed no step boundary for too long."""

_GRACE = 60.0
"""Additional seconds after which a process is ended even if our thread cannot run."""


class Watchdog:
    """Ends this process unless :meth:`passed` is called again within that many seconds, from now on.

    Before that it writes a message and every thread's stack to standard error. If torch's flight recorder is on, its
    record of collectives is written to its usual file.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._step = seconds, 0
        self._since = time.time()
        self._last = time.monotonic()
        self._arm()
        threading.Thread(target=self._watch, name="titan_adam_mini.watchdog", daemon=True).start()

    def passed(self, step: int) -> None:
        """Report progress at this step."""
        self._step, self._last = step, time.monotonic()
        self._arm()

    def _arm(self) -> None:
        # A C thread, which needs no interpreter; its exit code is always 1.
        faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True, file=2)

    def _watch(self) -> None:
        while (left := self._last + self._seconds - time.monotonic()) > 0:
            time.sleep(left)
        try:
            message = (
                f"rank {os.environ.get('RANK', '0')}: no step boundary was passed for {self._seconds:g} seconds "
                f"(TITAN_ADAM_MINI_HANG_SECONDS); the last one was step {self._step}. Exit code {STUCK}. "
                "Stacks of all threads:\n"
            )
            os.write(2, message.encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
            self._dump_flight_recorder()
        finally:
            os._exit(STUCK)

    def _dump_flight_recorder(self) -> None:
        """Write the file that NCCL's own watchdog writes, unless it already has during this run."""
        dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
        prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
        if dump is None or prefix is None or int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")) <= 0:
            return
        file = Path(prefix + os.environ.get("RANK", "0"))
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime >= self._since:
                return
        file.write_bytes(dump())
        os.write(2, f"The flight recorder's trace is in {file}.\n".encode())
