"""torchrun for runs that save on a signal. It takes torchrun's arguments, with these differences:

- TERM and USR1 are forwarded to the ranks of this node, which save and exit without a time limit; torchrun would give
  them 30 seconds after TERM, and be killed by USR1. Before ranks are started, either signal ends it.
- The exit status is that of the rank that failed first, 128 + n if signal n ended it; torchrun's is always 1.
- FAILURES=FILE in the environment: details of every failed rank are written there as JSON.
"""

import json
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from titan_adam_mini.files import atomic_write

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def forward(number: int) -> None:
    """Forward a signal to the ranks, the children of this process (Linux). Exits if there have never been any."""
    ranks = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    # If ranks have ended, this process must still report their status, maybe after those of other nodes have ended.
    if not ranks and not resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss:
        os._exit(128 + number)


def listen() -> None:
    """Handle signals in a separate thread: torchrun's main thread may wait for other nodes in C++, blocking
    handlers."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(write)

    def forward_all() -> None:
        while number := os.read(read, 1)[0]:
            if number in FORWARDED:
                forward(number)

    threading.Thread(target=forward_all, daemon=True).start()


def failures(failed: ChildFailedError) -> list[dict[str, Any]]:
    """Every failed rank of this node: rank, node, status, time (Unix seconds), error, traceback ("" if none)."""
    failed_ranks = []
    for rank, failure in failed.failures.items():
        code = failure.exitcode
        message = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
        if code > 0 and failure.message is not message:  # torchrun's generic hint if the rank reported no error
            message = {"message": ""}
        failed_ranks.append(
            {
                "rank": rank,
                "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
                "status": code if code > 0 else 128 - code,
                "time": failure.timestamp,
                "error": message["message"],
                "traceback": message.get("extraInfo", {}).get("py_callstack", ""),
            }
        )
    return failed_ranks


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; returns the exit status."""
    listen()
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as failed:
        print(failed, file=sys.stderr)
        failed_ranks = failures(failed)
        if file := os.environ.get("FAILURES"):
            try:
                atomic_write(file, json.dumps(failed_ranks))
            except OSError as error:  # the exit status matters more
                print(f"FAILURES={file} could not be written: {error}", file=sys.stderr)
        first, _ = failed.get_first_failure()
        return next(int(failure["status"]) for failure in failed_ranks if failure["rank"] == first)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
