"""Work that needs torchtitan, done in a process of its own, which ends before the command's own work begins."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_child(function: Any, *args: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except SystemExit as error:  # torchtitan's own parser, which has said what is wrong
            raise ValueError(f"torchtitan does not take these arguments (status {error.code})") from None
