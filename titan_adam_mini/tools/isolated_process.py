"""Runs functions that need torchtitan in a separate process, which ends before the command's own work begins."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol


class IsolatedProcess(Protocol):
    """Calls functions in one other process, so that imports are shared between calls."""

    def __call__(self, function: Any, *args: Any) -> Any:
        """Returns or raises what the function returns or raises there."""


@contextmanager
def isolated_process() -> Iterator[IsolatedProcess]:
    """A process for several calls; it ends with the context."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def call(function: Any, *args: Any) -> Any:
            try:
                return pool.submit(function, *args).result()
            except BrokenProcessPool:
                raise ValueError(
                    "a process of this command was killed, perhaps because the system ran out of memory (see dmesg)"
                ) from None
            except SystemExit as error:  # from torchtitan's own parser, which has printed what is wrong
                raise ValueError(f"torchtitan does not take these arguments (status {error.code})") from None

        yield call


def in_isolated_process(function: Any, *args: Any) -> Any:
    """Call a function in a separate process."""
    with isolated_process() as call:
        return call(function, *args)
