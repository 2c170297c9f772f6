"""Work that needs torchtitan, done in a process of its own, which ends before the command's own work begins."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol


class IsolatedProcess(Protocol):
    """Calls a function in another process, which keeps what it has imported from one call to the next."""

    def __call__(self, function: Any, *args: Any) -> Any:
        """What the function returns there, or raises."""


@contextmanager
def isolated_process() -> Iterator[IsolatedProcess]:
    """A process for several calls; it ends with the context."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def call(function: Any, *args: Any) -> Any:
            try:
                return pool.submit(function, *args).result()
            except BrokenProcessPool:
                raise ValueError(
                    "a process of this command was killed, perhaps by the system for want of memory (dmesg says so)"
                ) from None
            except SystemExit as error:  # torchtitan's own parser, which has said what is wrong
                raise ValueError(f"torchtitan does not take these arguments (status {error.code})") from None

        yield call


def in_isolated_process(function: Any, *args: Any) -> Any:
    """What a function returns in a process of its own."""
    with isolated_process() as call:
        return call(function, *args)
