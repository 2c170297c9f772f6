"""A folder that appears whole or not at all, whatever happens to who writes it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files import beside, name_file, sync_folder
from ..tools.signals import ending_in_order


@contextmanager
def appearing(target: Path, size: int) -> Iterator[Path]:
    """A new folder to write in, which is called `target` once the block ends well and is gone if it does not.

    Args:
        target: what must not exist yet, not even as a link to nowhere.
        size: bytes that will be needed.

    Raises:
        ValueError: there is something at `target` or another conversion is writing it, one that was killed has left its
            folder there, or the disk has no place for `size` bytes.
        OSError: the folder cannot be made or moved.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} exists; nothing is overwritten: remove it, or name another folder")
    target = target.absolute()
    existing = next(parent for parent in target.parents if parent.is_dir())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(f"{existing} has {free:,} bytes free, and the conversion may need {size:,}")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # torchtitan takes whatever holds "step-N" for a checkpoint, so this name must not.
    name = f"converting-{target.name.replace('step-', '')}"
    folder, done = beside(target, name), False
    try:
        _refuse_others(target, name)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with ending_in_order():
                yield folder
                os.fsync(handle)
                folder.rename(target)  # fails if somebody else has put something there
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
            for parent in made:
                with suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()


def _refuse_others(target: Path, name: str) -> None:
    """Raise ValueError if a conversion is writing `target`, or was killed as it did."""
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
        raise ValueError(f"{other} is what a killed conversion to {target} has left: remove it")
