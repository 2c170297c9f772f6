"""Saved by torch's distributed checkpoint on one mesh, loaded on another, and trained on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from injected import holdings, together
from meshes import MESHES
from ranks import run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from titan_adam_mini.check.injected import make, take_step, values
from titan_adam_mini.check.meshes import Placed, full_shapes
from titan_adam_mini.checkpoint import check_checkpoint

SAVED, STEPS = 3, 6
PAIRS = (
    *(("FSDP2 2", other) for other in ("one rank", "FSDP2 3", "FSDP2 4", "FSDP2 5", "HSDP 2x2", "FSDP2 8")),
    *((other, "FSDP2 2") for other in ("one rank", "FSDP2 7", "FSDP2 8", "HSDP 2x3", "FSDP2 2, CPU offload", "PP 2")),
    *(("HSDP 2x2", "HSDP 2x3"), ("FSDP2 7", "HSDP 2x2"), ("HSDP 2x3", "FSDP2 3"), ("one rank", "PP x FSDP2 2x2")),
    *(("PP 2", "FSDP2 3"), ("PP x FSDP2 2x2", "FSDP2 5"), ("FSDP2 3", "PP 2")),
    *(("FSDP2 3, even", "FSDP2 x TP 2x2, even"), ("FSDP2 x TP 2x2, even", "FSDP2 3, even")),
    *(("FSDP2 x TP 3x2", "FSDP2 2"), ("FSDP2 7", "FSDP2 x TP 2x3"), ("HSDP x TP 2x2x2", "FSDP2 x TP 3x2")),
    *(("TP 3", "FSDP2 x TP 2x2, norms on dp"), ("PP x FSDP2 x TP 2x2x2", "FSDP2 2"), ("one rank", "TP 4")),
    *(("EP 2", "FSDP2 4, experts"), ("FSDP2 4, experts", "FSDP2 x EP 2x2"), ("FSDP2 x EP 2x2", "EP 2")),
)
"""(saved on, loaded on)."""


def state_of(placed: Placed, optimizer: torch.optim.Optimizer, flat: bool) -> tuple[dict[str, Any], StateDictOptions]:
    """Model and optimizer as torchtitan saves them (flat), or nested."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optim = get_state_dict(placed.module, optimizer, options=options)
    return {"model": model, "optim": optim}, options


def save(
    rank: int, world: int, name: str, dtype: torch.dtype, folder: str, flat: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Train three steps, save, and say what was saved."""
    mesh = MESHES[name]
    placed = Placed.decoder(mesh, dtype).fill(values(full_shapes(mesh.sizes)))
    optimizer = make("AdamMini", placed.params, mesh.sizes, **options)
    for step in range(SAVED):
        take_step(mesh, placed, optimizer, step)
    dcp.save(state_of(placed, optimizer, flat)[0], checkpoint_id=folder)
    return holdings(placed, optimizer)


def load(
    rank: int, world: int, name: str, dtype: torch.dtype, folder: str, flat: bool, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Load into a fresh model and optimizer, neither of which has ever stepped, and train three more steps."""
    mesh = MESHES[name]
    placed = Placed.decoder(mesh, dtype)
    optimizer = make("AdamMini", placed.params, mesh.sizes, **options)
    optimizer.init_state()
    state, how = state_of(placed, optimizer, flat)
    check_checkpoint(folder, state)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        placed.module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=how
    )
    loaded = holdings(placed, optimizer)
    for step in range(SAVED, STEPS):
        take_step(mesh, placed, optimizer, step)
    return [loaded, holdings(placed, optimizer)]


def moved(
    saved_on: str, loaded_on: str, dtype: torch.dtype, folder: Path, flat: bool = True, **options: Any
) -> tuple[dict[str, dict[str, Any]], ...]:
    """Everything, put together: as saved on one mesh, as loaded on the other, and after going on there."""
    shapes = full_shapes(MESHES[saved_on].sizes)
    saved = run(save, MESHES[saved_on].world, saved_on, dtype, str(folder), flat, options)
    ranks = run(load, MESHES[loaded_on].world, loaded_on, dtype, str(folder), flat, options)
    return tuple(together(shapes, some) for some in (saved, [one[0] for one in ranks], [one[1] for one in ranks]))
