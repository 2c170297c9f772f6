"""A machine of a test cluster, as a process: runs one daemon, and ends with everything that came of it.

    python machine.py COMMAND [ARGUMENT ...]

Whatever the daemon starts stays below this process, also once it is orphaned or in a session of its own. All of it
is killed when standard input ends, which it does too when the test that holds the other end is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(of: int) -> list[int]:
    """The processes below `of`, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has just ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [of]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the orphans
    sys.stdin.buffer.read(1)
    while pids := descendants(os.getpid()):
        # A machine dies as a whole: nobody on it is left to report the death of another.
        for last in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, last)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
