"""A converted checkpoint is there whole or not at all; nothing of anybody else is removed or followed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from titan_adam_mini.convert.atomic_folder import atomic_folder


def write(target: Path) -> None:
    with atomic_folder(target, 10) as folder:
        (folder / ".metadata").write_text("whole")


def test_it_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-4"
    with atomic_folder(target, 10) as folder:
        assert folder.parent == target.parent and "step-" not in folder.name and not target.exists()
        (folder / ".metadata").write_text("whole")
        with pytest.raises(ValueError, match=r"another conversion is writing .*/deep/step-4: wait"):
            write(target)
        write(target.with_name("step-41"))  # another name is another conversion
    assert sorted(path.name for path in target.parent.iterdir()) == ["step-4", "step-41"]
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(target.parent.stat().st_mode), "others may read it"


@pytest.mark.parametrize("full", ["fsync", "write"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    def no_place(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = r"No space left on device: '.*/deep/step-4'"
    with pytest.raises(OSError, match=said), atomic_folder(tmp_path / "deep" / "step-4", 10) as folder:
        (folder / "__0_0.distcp").write_text("half")
        if full == "write":
            no_place()
        monkeypatch.setattr(os, "fsync", no_place)
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_put_there_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-4"
    with pytest.raises(OSError, match="not empty"), atomic_folder(target, 10) as folder:
        (folder / ".metadata").write_text("ours")
        target.mkdir()
        (target / ".metadata").write_text("theirs")
    assert [path.name for path in target.parent.iterdir()] == ["step-4"]
    assert (target / ".metadata").read_text() == "theirs"


def test_what_a_killed_conversion_has_left_is_named_and_left(tmp_path: Path) -> None:
    target = tmp_path / "step-4"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, 10) as folder:
        shutil.copytree(folder, rest := folder.with_name(f"{folder.name}rest"))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=rf"{rest} was left by a killed conversion to {target}: remove it"):
        write(target)
    assert list(tmp_path.iterdir()) == [rest]


def test_links_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "step-4").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="step-4 exists; nothing is overwritten"):
        write(tmp_path / "step-4")
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
