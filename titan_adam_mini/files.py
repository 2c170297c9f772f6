"""Files that are whole at any moment, and only where nobody put a link."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: str | Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file to write bytes into, which becomes `file` once the block ends well and is gone if it does not.

    Whoever reads `file` meanwhile, or after a kill or a power failure, finds what was there before or all of the new
    one. What is no regular file, such as a pipe or /dev/null, is written as it is.

    Args:
        file: its folder must exist.
        sync: wait until the disk has it.

    Raises:
        OSError: it cannot be written, or is a symbolic link (ELOOP).
    """
    file = Path(file)
    if file.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link: name the file that is meant", str(file))
    if file.exists() and not file.is_file():
        with open(file, "wb") as stream:
            yield stream
        return
    new = beside(file)
    # Not tempfile's, which nobody else may read: it replaces a file with this process's usual permissions.
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(handle)
        os.replace(new, file)
    except BaseException as error:
        new.unlink(missing_ok=True)
        name_file(error, file)
        raise
    if sync:
        sync_folder(file.parent)


def atomic_write(file: str | Path, text: str, *, sync: bool = True) -> None:
    """Write a text file in UTF-8; see `replacing`."""
    with replacing(file, sync=sync) as stream:
        stream.write(text.encode())


def name_file(error: BaseException, file: Path) -> None:
    """Let an OSError that names no file, such as that of a full disk, name this one."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(file)


def beside(path: Path, name: str = "") -> Path:
    """A path in the same folder, hidden, that nobody can have guessed: create it so that it must not exist.

    Args:
        path: what is to be replaced or made.
        name: what the new name says; that of `path` by default.
    """
    return path.with_name(f".{name or path.name}.{secrets.token_hex(6)}")


def sync_folder(folder: Path) -> None:
    """Wait until the disk has what was created, renamed or removed in a folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)
