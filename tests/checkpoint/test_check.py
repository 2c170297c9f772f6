"""Every wrong input gets a sentence, from the metadata alone, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stored_runs import partition

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.meshes import DENSE, full_shapes
from titan_adam_mini.checkpoint import check_checkpoint
from titan_adam_mini.checkpoint.stored import Stored


def wanted(blocks: Partition | None = None, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """What a run with this partition would load, flat."""
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (shapes or full_shapes(DENSE)).items()}
    optimizer = AdamMini(list(params.items()), partition=blocks or partition())
    optimizer.init_state()
    state = {
        f"optimizer.state.{name}.{key}": value
        for name, param in params.items()
        for key, value in optimizer.state[param].items()
    }
    return {**{name: param.detach() for name, param in params.items()}, **state}


def test_what_fits_passes_flat_and_nested(mini: Path) -> None:
    flat = wanted()
    check_checkpoint(mini, flat)
    nested = {name: value for name, value in flat.items() if not name.startswith("optimizer.")}
    nested["optimizer"] = {
        name.removeprefix("optimizer."): value for name, value in flat.items() if name.startswith("optimizer.")
    }
    check_checkpoint(str(mini), nested)


def test_whose_state_it_is(adamw: Path, mini: Path) -> None:
    assert (Stored(adamw).optimizer(), Stored(mini).optimizer()) == ("AdamW", "AdamMini")
    assert Stored(mini).optimizer("optim.") is None


def test_what_does_not_fit_is_told(adamw: Path, mini: Path) -> None:
    shapes = full_shapes(DENSE)
    with pytest.raises(
        ValueError, match=r"contains AdamW's optimizer state.*titan-adam-mini convert.*load_adamw_state"
    ):
        check_checkpoint(adamw, wanted())
    with pytest.raises(ValueError, match=r"another partition: .*wq.weight.exp_avg_sq is \(\d+, 1\) there and \(1, 1\)"):
        check_checkpoint(mini, wanted(Partition.per_tensor()))
    with pytest.raises(ValueError, match=r"no optimizer state for layers.9.attention.wo.weight.exp_avg_sq"):
        check_checkpoint(mini, wanted(shapes={**shapes, "layers.9.attention.wo.weight": (3, 5)}))
    with pytest.raises(ValueError, match=r"is from another model: output.weight is .* there and .* here"):
        check_checkpoint(mini, {**wanted(), "output.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"has no train_state.other"):
        check_checkpoint(mini, {**wanted(), "train_state": {"other": 1}})
    elementwise = {
        name: wanted()[name.replace("exp_avg_sq", "exp_avg")] if name.endswith("exp_avg_sq") else value
        for name, value in wanted().items()
    }
    with pytest.raises(ValueError, match="leave out load_adamw_state"):
        check_checkpoint(mini, elementwise)
    check_checkpoint(adamw, elementwise)


def test_models_alone_and_the_authors_state_are_told_apart(tmp_path: Path) -> None:
    flat = wanted()
    model = {name: value for name, value in flat.items() if not name.startswith("optimizer.")}
    dcp.save(model, checkpoint_id=tmp_path / "model", no_dist=True)
    with pytest.raises(ValueError, match="contains only a model"):
        check_checkpoint(tmp_path / "model", flat)
    upstream = {f"optimizer.state.{name}.vmean": torch.zeros(1) for name in model}
    dcp.save({**model, **upstream}, checkpoint_id=tmp_path / "upstream", no_dist=True)
    with pytest.raises(ValueError, match="authors' adam-mini"):
        check_checkpoint(tmp_path / "upstream", flat)


@pytest.mark.parametrize("how", ["missing", "cut", "metadata", "half"])
def test_damage_is_seen_before_anything_is_read(mini: Path, tmp_path: Path, how: str) -> None:
    import shutil

    path = tmp_path / "step-4"
    shutil.copytree(mini, path)
    file = path / ("__1_0.distcp" if how in ("missing", "cut") else ".metadata")
    if how in ("missing", "half"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    told = {"missing": "is missing", "cut": "bytes: the checkpoint is damaged", "metadata": "cannot be read"}
    with pytest.raises(ValueError, match=told.get(how, "no .metadata, which is written last")):
        check_checkpoint(path, wanted())
