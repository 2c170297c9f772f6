"""A full disk and a process that died are one sentence each, with status 1, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from titan_adam_mini.cli import main
from titan_adam_mini.tools.isolated_process import in_isolated_process, isolated_process

BLOCK = {"address": 4096, "size": 512, "requested_size": 500, "state": "active_allocated", "frames": []}
SNAPSHOT = {"segments": [{"device": 0, "total_size": 512, "blocks": [BLOCK]}], "device_traces": [[]]}


def failed(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source, out = tmp_path / "a.pickle", tmp_path / "out.png"
    source.write_bytes(pickle.dumps(SNAPSHOT))
    monkeypatch.setattr(os, "fsync", full)
    assert failed(capsys, "snapshot", source, flag, out).endswith(f"No space left on device: '{out}'")
    assert list(tmp_path.iterdir()) == [source]


def test_a_process_that_died() -> None:
    with pytest.raises(ValueError, match="a process of this command was killed"):
        in_isolated_process(os._exit, 9)
    with isolated_process() as call:
        for _ in range(2):  # the second call finds it dead
            with pytest.raises(ValueError, match="a process of this command was killed"):
                call(os._exit, 9)
