"""Nothing that a checkpoint or a snapshot holds is executed: what is not plain data is refused in a sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from titan_adam_mini.checkpoint.metadata import read_metadata
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.memory.snapshot import read
from titan_adam_mini.pickles import NotAllowed, unpickle


class Malicious:
    """Makes a file as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


STATE = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "channels": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "eighth": torch.zeros(3, dtype=torch.float8_e4m3fn),
    "dataloader": {"world_size": 2, "dp_rank_0": pickle.dumps({"position": 3})},
    "lr_scheduler": {"base_lrs": [1e-3], "_last_lr": [1e-3], "lr_lambdas": [None], "last_epoch": 4},
    "optimizer": {"betas": (0.9, 0.95), "foreach": None, "fused": True, "lr": torch.tensor(1e-3)},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with everything that torchtitan saves, by kind."""
    dcp.save(STATE, checkpoint_id=tmp_path / "step-1", no_dist=True)
    return tmp_path / "step-1"


def test_what_torch_writes_is_read_as_torch_reads_it(saved: Path) -> None:
    ours, theirs = read_metadata((saved / ".metadata").read_bytes()), FileSystemReader(saved).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    stored = Stored(saved)
    assert torch.equal(stored.value("weight"), STATE["weight"])
    for name in ("dataloader", "lr_scheduler", "optimizer"):
        for key, value in STATE[name].items():
            assert stored.value(f"{name}.{key}") == value


def test_malicious_metadata_is_refused_before_anything_runs(saved: Path) -> None:
    mark = saved.parent / "ran"
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Malicious(mark)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata was not written by .*refers to pathlib\S*touch.*nothing was"):
        Stored(saved)
    assert not mark.exists()
    FileSystemReader(saved).read_metadata()
    assert mark.exists(), "the same file runs in torch's own reader"


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))[:-9]])
def test_damaged_metadata_is_a_sentence(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read .*use another step"):
        Stored(saved)


def test_a_malicious_entry_is_refused_by_name_before_anything_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    dcp.save({"train_state": {"step": 1, "more": Malicious(mark)}}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    mark.unlink(missing_ok=True)
    stored = Stored(tmp_path / "step-1")
    assert stored.value("train_state.step") == 1
    with pytest.raises(ValueError, match=r"step-1: its entry 'train_state.more' refers to getattr.*nothing was run"):
        stored.value("train_state.more")
    assert not mark.exists()


def test_a_malicious_snapshot_is_refused_before_anything_runs(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "snapshot.pickle"
    file.write_bytes(pickle.dumps({"segments": [], "device_traces": [Malicious(mark)]}))
    with pytest.raises(ValueError, match=r"contains a pathlib\S*touch.*nothing in it was executed"):
        read(file)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_looked_up_that_is_not_on_the_list(protocol: int) -> None:
    assert unpickle(pickle.dumps({"a": [1, (2.5, "x", None)]}, protocol)) == {"a": [1, (2.5, "x", None)]}
    with pytest.raises(NotAllowed, match=rf"^{os.system.__module__}\.system$"):
        unpickle(pickle.dumps(os.system, protocol), {"torch.Size": torch.Size})
    with pytest.raises(pickle.UnpicklingError):
        unpickle(pickle.dumps([1, 2, 3], protocol)[:-1])
