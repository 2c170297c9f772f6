"""Files are whole at any moment, nobody's links are followed, and a full disk leaves what was there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from titan_adam_mini.files import atomic_write, replacing


def test_a_file_takes_the_place_of_the_old_one_with_the_usual_permissions(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    atomic_write(file, "old")
    mask = os.umask(0o027)
    try:
        atomic_write(file, "new")
    finally:
        os.umask(mask)
    assert file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("sync", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync" if sync else "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*figures.json'"):
        atomic_write(file, "new", sync=sync)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_links_are_refused_and_what_they_name_is_left_alone(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("somebody's")
    link.symlink_to(other)
    with pytest.raises(OSError, match="is a symbolic link"):
        atomic_write(link, "new")
    assert link.is_symlink() and other.read_text() == "somebody's"


def test_what_is_no_regular_file_is_written_as_it_is(tmp_path: Path) -> None:
    """A pipe of the test's own: a wrong program must not find /dev/null here, which it would replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, "text")
        assert os.read(reader, 100) == b"text" and pipe.is_fifo()
    finally:
        os.close(reader)


def test_what_is_written_lies_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (calls.append("fsync"), real(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths, real=os.replace: (calls.append("replace"), real(*paths)))
    atomic_write(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"], "the file, then its name, then the folder"
    calls.clear()
    atomic_write(tmp_path / "file", "text", sync=False)
    assert calls == ["replace"]
