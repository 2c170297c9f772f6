"""A folder that is created completely or not at all, even if the process is killed while it writes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files import beside, name_file, sync_folder
from ..tools.signals import sigterm_as_exit


@contextmanager
def atomic_folder(target: Path, size: int) -> Iterator[Path]:
    """A new folder to write to, which is renamed to `target` when the block succeeds and removed if it raises.

    Args:
        target: must not exist, not even as a broken link.
        size: bytes that will be needed.

    Raises:
        ValueError: `target` exists, another conversion is writing it, a killed one left its folder there, or the disk
            does not have `size` bytes free.
        OSError: the folder cannot be created or renamed.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} exists; nothing is overwritten: remove it, or name another folder")
    target = target.absolute()
    existing = next(parent for parent in target.parents if parent.is_dir())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(f"{existing} has {free:,} bytes free, and the conversion may need {size:,}")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # torchtitan takes any name that contains "step-N" for a checkpoint, so this one must not.
    name = f"converting-{target.name.replace('step-', '')}"
    folder, done = beside(target, name), False
    try:
        _refuse_others(target, name)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with sigterm_as_exit():
                yield folder
                os.fsync(handle)
                folder.rename(target)  # fails if another process has created it
                sync_folder(target.parent)
                done = True
        except OSError as error:
            name_file(error, target)
            raise
        finally:
            os.close(handle)
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not done:
            for parent in new_parents:
                with suppress(OSError):  # another process may use it by now
                    parent.rmdir()


def _refuse_others(target: Path, name: str) -> None:
    """Raise ValueError if another conversion is writing `target`, or was killed while it did."""
    for other in target.parent.iterdir():
        if not other.name.startswith(f".{name}."):
            continue
        try:
            handle = os.open(other, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another conversion is writing {target}: wait for it, or name another folder") from None
        finally:
            os.close(handle)
        raise ValueError(f"{other} was left by a killed conversion to {target}: remove it")
