"""A folder that appears whole or not at all, whatever happens to who writes it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def appearing(target: Path, size: int) -> Iterator[Path]:
    """A folder to write in, which is called `target` once the block ends well and is gone if it does not.

    What a killed conversion has left there is removed by the next one of the same target.
    """
    if target.exists():
        raise ValueError(f"{target} exists; nothing is overwritten: remove it, or name another folder")
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(f"{existing} has {free:,} bytes free, and the conversion may need {size:,}")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    # torchtitan takes whatever holds "step-N" for a checkpoint, so this name must not.
    folder = target.absolute().parent / f".converting-{target.name.replace('step-', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    done = False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made = []
            raise ValueError(f"another conversion is writing {target}: wait for it, or name another folder") from None
        try:
            for old in folder.iterdir():
                old.unlink()
            with ending_in_order():
                yield folder
                folder.rename(target)
                done = True
        finally:
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
        if not done:
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


@contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its cleaning up happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
