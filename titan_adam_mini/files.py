"""Atomic file writes that do not follow symbolic links."""

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
    """A new file to write bytes into, which replaces `file` if the block succeeds and is deleted if it fails.

    Readers see either the old or the complete new content, also after a kill or a power failure. If `file` is not a
    regular file, such as a pipe or /dev/null, it is written directly.

    Args:
        file: its folder must exist.
        sync: wait until the data are on disk.

    Raises:
        OSError: it cannot be written, or is a symbolic link (ELOOP).
    """
    file = Path(file)
    if file.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link: pass the path that it points to", str(file))
    if file.exists() and not file.is_file():
        with open(file, "wb") as stream:
            yield stream
        return
    new = beside(file)
    # Not tempfile, whose files are private: the new file has this process's usual permissions.
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
    """Set the file of an OSError that names none, such as that of a full disk."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(file)


def beside(path: Path, name: str = "") -> Path:
    """An unpredictable hidden path in the same folder; open it such that it must not exist yet.

    Args:
        path: the file to be replaced or created.
        name: part of the new name; that of `path` by default.
    """
    return path.with_name(f".{name or path.name}.{secrets.token_hex(6)}")


def sync_folder(folder: Path) -> None:
    """Wait until creations, renames and removals in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)
