"""torchtitan's checkpoints: read box by box in little memory, and refused in a sentence where they do not serve."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stored_runs import STEPS, partition, saved
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from titan_adam_mini import Partition
from titan_adam_mini.check.meshes import DENSE, full_shapes
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.inspect import Moments, inspect
from titan_adam_mini.inspect.moments import stored_moments

STATE = "optimizer.state."
SHAPES = full_shapes(DENSE)


@pytest.fixture(scope="module", params=[pytest.param("FSDP2 3", marks=pytest.mark.slow), "FSDP2 x TP 2x2"])
def adamw(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return saved(tmp_path_factory.mktemp("adamw"), "AdamW", request.param)


def test_any_box_is_read_as_it_is_in_the_whole(adamw: Path) -> None:
    stored = Stored(adamw)
    for name, shape in SHAPES.items():
        key = f"{STATE}{name}.exp_avg_sq"
        whole = stored.read(key)
        for box in (
            tuple((0, size) for size in shape),
            tuple((size // 3, size // 3 + max(1, size // 2)) for size in shape),
            tuple((size - 1, size) for size in shape),
        ):
            assert torch.equal(stored.window(key, box), whole[tuple(slice(*one) for one in box)]), (name, box)


def test_parts_may_lie_in_any_order_and_in_any_type(tmp_path: Path) -> None:
    turned, half = torch.arange(42.0).reshape(6, 7).t(), torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    dcp.save({"turned": turned, "half": half}, checkpoint_id=tmp_path, no_dist=True)
    stored = Stored(tmp_path)
    assert torch.equal(stored.window("turned", ((2, 5), (1, 4))), turned[2:5, 1:4])
    assert torch.equal(stored.window("half", ((1, 3), (3, 4))), half[1:3, 3:4])


def test_a_checkpoint_says_what_the_tensors_in_it_say(adamw: Path) -> None:
    stored = Stored(adamw)
    by_window = inspect(stored_moments(stored, SHAPES), partition(), window=17)
    options = {"step": STEPS, "betas": (0.9, 0.999), "eps": 1e-8}
    in_memory = inspect(
        [
            Moments.of(name, *(stored.read(f"{STATE}{name}.{key}") for key in ("exp_avg_sq", "exp_avg")), **options)
            for name in SHAPES
        ],
        partition(),
    )
    assert by_window.steps == in_memory.steps
    for name, losses in in_memory.losses.items():
        for candidate, loss in losses.items():
            other = by_window.losses[name][candidate]
            assert other.noise == pytest.approx(loss.noise, rel=1e-9, abs=1e-13)
            assert other.distance == pytest.approx(loss.distance, rel=1e-9, abs=1e-9)
            assert other.rms_ratio == pytest.approx(loss.rms_ratio, rel=1e-9)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """One part of 32 MiB of second moments, and as much momentum: a few windows of half a MiB are held."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process's memory is set back and read in Linux's /proc")
    paths = []
    for rows in (256, 8192):
        paths.append(tmp_path / f"step-{rows}")
        v = torch.rand(rows, 1024)
        state = {f"state.wo.weight.{key}": v for key in ("exp_avg", "exp_avg_sq")}
        group = {"param_groups.wo.weight.betas": (0.9, 0.95), "param_groups.wo.weight.eps": 1e-8}
        optimizer = {**state, **group, "state.wo.weight.step": torch.tensor(7.0)}
        dcp.save({"optimizer": optimizer}, checkpoint_id=paths[-1], no_dist=True)
    del v, state, optimizer
    gc.collect()

    def look(path: Path, rows: int) -> None:
        moments = stored_moments(Stored(path), {"wo.weight": (rows, 1024)})
        inspect(moments, Partition.transformer(), window=1 << 16)

    def kilobytes(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    look(paths[0], 256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = kilobytes("VmRSS")
    look(paths[1], 8192)
    assert kilobytes("VmHWM") - before < 16 << 10, f"{kilobytes('VmHWM') - before:,} kB more"


def test_a_parameter_that_never_had_a_gradient_has_no_state(tmp_path: Path) -> None:
    """Its hyper-parameters tell it from one that another model has."""
    model = torch.nn.ModuleDict({"wo": torch.nn.Linear(6, 4, bias=False), "w1": torch.nn.Linear(6, 8, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(7):
        model["wo"].weight.grad = torch.rand(4, 6)
        optimizer.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)  # as torchtitan saves
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    stored = Stored(tmp_path / "step-7")
    inspection = inspect(stored_moments(stored, {"wo.weight": (4, 6), "w1.weight": (8, 6)}), Partition.transformer())
    assert inspection.without_gradient == {"w1.weight": 1}
    assert inspection.steps == {"wo.weight": 7, "w1.weight": 0}
    with pytest.raises(ValueError, match=r"has no state for w2.weight of the configuration's model"):
        stored_moments(stored, {"wo.weight": (4, 6), "w1.weight": (8, 6), "w2.weight": (6, 8)})


def test_what_cannot_be_looked_at_is_refused_in_words(adamw: Path, tmp_path: Path) -> None:
    stored = Stored(adamw)
    more = {**SHAPES, "layers.9.attention.wq.weight": (8, 8)}
    fewer = {name: shape for name, shape in SHAPES.items() if "wk" not in name}
    other = {**SHAPES, "output.weight": (3, 4)}
    for shapes, told in (
        (
            more,
            r"has no state for layers\.9\.attention\.wq\.weight of the configuration's model: is this the config",
        ),
        (fewer, r"has state for .*wk\.weight.* that the configuration's model does not have"),
        (other, r"output\.weight is \(.*\) in .* and \(3, 4\) in the configuration's model"),
    ):
        with pytest.raises(ValueError, match=told):
            stored_moments(stored, shapes)
    mini = Stored(saved(tmp_path, "AdamMini", "one rank"))
    with pytest.raises(
        ValueError, match="contains AdamMini's optimizer state, which has only the means over its blocks; inspect"
    ):
        stored_moments(mini, SHAPES)
    model = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.save(model, checkpoint_id=tmp_path / "model", no_dist=True)
    with pytest.raises(
        ValueError, match=r"has no optimizer state: it contains the model only .*last_save_model_only = false"
    ):
        stored_moments(Stored(tmp_path / "model"), SHAPES)
    theirs = {f"optimizer.state.{name}.vmean": torch.zeros(1) for name in model}
    dcp.save({**model, **theirs}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with pytest.raises(ValueError, match="authors' adam-mini"):
        stored_moments(Stored(tmp_path / "theirs"), SHAPES)
