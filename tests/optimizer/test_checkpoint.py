"""Saved by torch's distributed checkpoint on one mesh, loaded on another, and trained on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from injected import holdings, make, on_one_device, take_step, together, values
from meshes import CATALOGUE, Placed, full_shapes
from oracle import error
from ranks import run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

SAVED, STEPS = 3, 6


def state_of(placed: Placed, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], StateDictOptions]:
    """Model and optimizer as torchtitan saves them."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optim = get_state_dict(placed.module, optimizer, options=options)
    return {"model": model, "optim": optim}, options


def save(rank: int, world: int, name: str, dtype: torch.dtype, folder: str) -> None:
    """Train three steps and save."""
    mesh = CATALOGUE[name]
    placed = Placed.decoder(mesh, dtype).fill(values(full_shapes(mesh.sizes)))
    optimizer = make("AdamMini", placed.params, mesh.sizes)
    for step in range(SAVED):
        take_step(mesh, placed, optimizer, step)
    dcp.save(state_of(placed, optimizer)[0], checkpoint_id=folder)


def load(rank: int, world: int, name: str, dtype: torch.dtype, folder: str) -> dict[str, Any]:
    """Load into a fresh model and optimizer, neither of which has ever stepped, and train three more steps."""
    mesh = CATALOGUE[name]
    placed = Placed.decoder(mesh, dtype)
    optimizer = make("AdamMini", placed.params, mesh.sizes)
    state, options = state_of(placed, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        placed.module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
    )
    loaded = holdings(placed, optimizer)["step"]
    for step in range(SAVED, STEPS):
        take_step(mesh, placed, optimizer, step)
    return {**holdings(placed, optimizer), "loaded": loaded}


def trained_on(saved_on: str, loaded_on: str, dtype: torch.dtype, folder: Path) -> dict[str, dict[str, Any]]:
    """Save on one mesh, load and go on on another, put together."""
    run(save, CATALOGUE[saved_on].world, saved_on, dtype, str(folder))
    mesh = CATALOGUE[loaded_on]
    ranks = run(load, mesh.world, loaded_on, dtype, str(folder))
    assert all(step == SAVED for one in ranks for step in one["loaded"].values())
    return together(full_shapes(mesh.sizes), ranks)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [("FSDP2 2", "FSDP2 5"), ("FSDP2 7", "HSDP 2x2"), ("HSDP 2x3", "FSDP2 3")]
)
def test_fsdp_to_fsdp_has_the_bits_of_a_run_without_a_break(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    got = trained_on(saved_on, loaded_on, torch.float32, tmp_path)
    want = on_one_device(CATALOGUE[loaded_on].sizes, dtype=torch.float32, steps=STEPS)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        for key, value in want[kind].items():
            assert got[kind][key].dtype == value.dtype and torch.equal(got[kind][key], value), (kind, key)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        ("FSDP2 3, even", "FSDP2 x TP 2x2, even"),
        ("FSDP2 x TP 2x2, even", "FSDP2 3, even"),
        ("EP 2", "FSDP2 4, experts"),
    ],
)
def test_between_meshes_of_other_kinds(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    got = trained_on(saved_on, loaded_on, torch.float64, tmp_path)
    want = on_one_device(CATALOGUE[loaded_on].sizes, steps=STEPS)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        assert max(error(got[kind][key], value) for key, value in want[kind].items()) < 1e-12, kind
