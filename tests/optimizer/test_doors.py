"""The other ways in which people save: a file per rank with torch.save, and whole tensors gathered on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injected import holdings, on_one_device, together
from meshes import CATALOGUE
from ranks import run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from titan_adam_mini.check.injected import make, take_step, values
from titan_adam_mini.check.meshes import Placed, full_shapes

SAVED, STEPS = 2, 4


def start(name: str) -> tuple[Any, Placed, Any]:
    mesh = CATALOGUE[name]
    placed = Placed.decoder(mesh, torch.float32).fill(values(full_shapes(mesh.sizes)))
    return mesh, placed, make("AdamMini", placed.params, mesh.sizes)


def a_file_per_rank(rank: int, world: int, name: str, folder: str) -> dict[str, Any]:
    """Save model and optimizer by torch.save, load them into new ones, go on."""
    mesh, placed, optimizer = start(name)
    for step in range(SAVED):
        take_step(mesh, placed, optimizer, step)
    assert placed.module is not None
    torch.save((placed.module.state_dict(), optimizer.state_dict()), f"{folder}/{rank}.pt")
    mesh, placed, optimizer = start(name)
    model, state = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    placed.module.load_state_dict(model)
    optimizer.load_state_dict(state)
    for step in range(SAVED, STEPS):
        take_step(mesh, placed, optimizer, step)
    return holdings(placed, optimizer)


def gathered(rank: int, world: int, name: str, file: str) -> None:
    """Save whole tensors, as people do who publish a model."""
    mesh, placed, optimizer = start(name)
    for step in range(SAVED):
        take_step(mesh, placed, optimizer, step)
    both = get_state_dict(placed.module, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(both, file)


def scattered(rank: int, world: int, name: str, file: str) -> dict[str, Any]:
    """Load whole tensors, go on."""
    mesh, placed, optimizer = start(name)
    optimizer.init_state()
    model, state = torch.load(file, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(placed.module, optimizer, model_state_dict=model, optim_state_dict=state, options=options)
    for step in range(SAVED, STEPS):
        take_step(mesh, placed, optimizer, step)
    return holdings(placed, optimizer)


def the_bits_of_one_device(name: str, ranks: list[dict[str, Any]]) -> bool:
    sizes = CATALOGUE[name].sizes
    got, want = together(full_shapes(sizes), ranks), on_one_device(sizes, dtype=torch.float32, steps=STEPS)
    kinds = ("params", "exp_avg", "exp_avg_sq")
    return all(torch.equal(got[kind][key], value) for kind in kinds for key, value in want[kind].items())


@pytest.mark.parametrize("name", ["HSDP 2x2", pytest.param("one rank", marks=pytest.mark.slow)])
def test_a_file_per_rank(name: str, tmp_path: Path) -> None:
    assert the_bits_of_one_device(name, run(a_file_per_rank, CATALOGUE[name].world, name, str(tmp_path)))


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [("HSDP 2x2", "FSDP2 3"), pytest.param("FSDP2 7", "one rank", marks=pytest.mark.slow)]
)
def test_whole_tensors(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    file = str(tmp_path / "whole.pt")
    run(gathered, CATALOGUE[saved_on].world, saved_on, file)
    assert the_bits_of_one_device(loaded_on, run(scattered, CATALOGUE[loaded_on].world, loaded_on, file))
