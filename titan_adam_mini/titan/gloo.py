"""gloo at the end of a process."""

import atexit
import time

EXIT_DELAY = 0.5
"""Seconds. gloo's threads release the last collective's tensors within them, and one that does so without an
interpreter aborts the process, whatever its exit code was to be (pytorch's pull request 179291). torchtitan has rank 0
wait for the others two seconds long."""


def keep_exit_code() -> None:
    """Have this process wait for gloo's threads before it ends. A second call changes nothing."""
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    time.sleep(EXIT_DELAY)
