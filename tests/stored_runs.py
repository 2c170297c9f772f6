"""Checkpoints as torchtitan writes them, of the small decoder trained by AdamW or AdamMini on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from meshes import MESHES
from ranks import run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.decoder import Sizes
from titan_adam_mini.check.injected import gradients, values
from titan_adam_mini.check.meshes import DENSE, Placed, full_shapes

LR, FACTOR, STEPS = 1e-3, 0.25, 4


def partition(sizes: Sizes = DENSE, second_moment: str = "blocks") -> Partition:
    """The decoder's."""
    heads = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
    return Partition.transformer(**heads, second_moment=second_moment)


def _train_and_save(
    rank: int, world: int, name: str, kind: str, folder: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    mesh = MESHES[name]
    shapes = full_shapes(mesh.sizes)
    placed = Placed.decoder(mesh, dtype).fill(values(shapes))
    if kind == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(list(placed.params.values()), lr=LR, foreach=True)
    else:
        second_moment = options.pop("second_moment", "blocks")
        own = partition(mesh.sizes, second_moment)
        optimizer = AdamMini(list(placed.params.items()), lr=LR, partition=own, **options)
    scheduler = LambdaLR(optimizer, lambda step: FACTOR)
    for step in range(STEPS):
        placed.inject(gradients(shapes, step))
        optimizer.step()
        scheduler.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(placed.module, optimizer, options=options)
    state = {
        **get_model_state_dict(placed.module),
        "optimizer": {key: value for key, value in flat.items() if not key.endswith(".param_names")},
        "lr_scheduler": scheduler.state_dict(),
        "train_state": {"step": STEPS, "words": ["any", {"thing": 1}]},
    }
    dcp.save(state, checkpoint_id=folder)


def saved(folder: Path, kind: str, mesh: str = "FSDP2 3", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The checkpoint `folder/step-4`; `options` are for AdamMini."""
    path = folder / f"step-{STEPS}"
    run(_train_and_save, MESHES[mesh].world, mesh, kind, str(path), dtype, options)
    return path


def group_of(kind: str) -> dict[str, Any]:
    """The keys of a new optimizer's group."""
    param = torch.nn.Parameter(torch.zeros(1, 1))
    made: torch.optim.Optimizer = torch.optim.AdamW([param], foreach=True)
    if kind == "AdamMini":
        made = AdamMini([("output.weight", param)], partition=partition())
    return {key: value for key, value in made.param_groups[0].items() if key not in ("params", "param_names")}
