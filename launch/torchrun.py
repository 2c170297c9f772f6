"""torchrun for runs that save on a signal. Its arguments are torchrun's; what differs:

- TERM and USR1 are handed to the ranks of this node, which save and leave in their own time, where torchrun would give
  them 30 seconds after a TERM and not survive a USR1. Before there are ranks, either ends it.
- The exit status is that of the rank that failed first, 128 + n if signal n ended it; torchrun's is always 1.
- FAILURES=FILE in the environment: what torchrun knows of every failed rank goes there as JSON.
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

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)


def hand_on(number: int) -> None:
    """Give a signal to the ranks: the children of this process (Linux). Ends it if there have never been any."""
    ranks = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    # Ranks that have ended leave it their status, which it may hold back until those of other nodes have ended.
    if not ranks and not resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss:
        os._exit(128 + number)


def listen() -> None:
    """Take signals in a thread of their own: torchrun's waits for other nodes in C++, where no handler runs."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in HANDED_ON:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(write)

    def take() -> None:
        while number := os.read(read, 1)[0]:
            if number in HANDED_ON:
                hand_on(number)

    threading.Thread(target=take, daemon=True).start()


def failures(failed: ChildFailedError) -> list[dict[str, Any]]:
    """Every failed rank of this node: rank, node, status, time (Unix seconds), error, traceback ("" if none)."""
    told = []
    for rank, failure in failed.failures.items():
        code = failure.exitcode
        message = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
        if code > 0 and failure.message is not message:  # torchrun's advice, where a rank has left no word
            message = {"message": ""}
        told.append(
            {
                "rank": rank,
                "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
                "status": code if code > 0 else 128 - code,
                "time": failure.timestamp,
                "error": message["message"],
                "traceback": message.get("extraInfo", {}).get("py_callstack", ""),
            }
        )
    return told


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; returns the exit status."""
    listen()
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as failed:
        print(failed, file=sys.stderr)
        told = failures(failed)
        if file := os.environ.get("FAILURES"):
            try:
                atomic_write(file, json.dumps(told))
            except OSError as error:  # the exit status says more
                print(f"FAILURES={file} could not be written: {error}", file=sys.stderr)
        first, _ = failed.get_first_failure()
        return next(int(one["status"]) for one in told if one["rank"] == first)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
