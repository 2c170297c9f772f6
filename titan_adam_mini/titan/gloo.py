"""Clean process exit with gloo."""

import atexit
import time

EXIT_DELAY = 0.5
"""Seconds within which gloo's threads release the last collective's tensors. A thread that does so after the
interpreter has ended aborts the process and changes its exit code (pytorch pull request 179291). torchtitan itself
makes rank 0 wait two seconds for the others."""


def keep_exit_code() -> None:
    """Make this process wait for gloo's threads before it exits. A second call changes nothing."""
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    time.sleep(EXIT_DELAY)
