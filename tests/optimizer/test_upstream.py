"""Against the authors' own `adam-mini` 1.1.1 on one process, where it is right, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.oracle import error

UNDECAYED = ["norm", "bias"]  # what upstream does not decay, whatever weight_decay is


class Block(nn.Module):
    """The projections of one layer of a Llama under torchtitan's names, with equal head counts for q and k."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in ("wq", "wk", "wv", "wo")})
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(dim, hidden), "w2": nn.Linear(hidden, dim)})
        self.attention_norm = nn.RMSNorm(dim)


class Model(nn.Module):
    """Two layers between an embedding and an output."""

    def __init__(self, dim: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(19, dim)
        self.layers = nn.ModuleDict({str(layer): Block(dim, hidden) for layer in range(2)})
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, 19, bias=False)


@pytest.mark.parametrize(("foreach", "betas"), [(True, (0.9, 0.999)), (False, (0.8, 0.95))])
def test_equals_upstream_over_10_steps(foreach: bool, betas: tuple[float, float], capsys: Any) -> None:
    adam_mini = pytest.importorskip("adam_mini", reason="upstream is installed with the test extra")
    torch.manual_seed(0)
    ours = Model().double()
    theirs = copy.deepcopy(ours)
    partition = Partition.transformer(n_heads=4, undecayed=UNDECAYED)
    named = ours.named_parameters()
    optimizer = AdamMini(named, 3e-3, betas, 1e-8, 0.1, partition=partition, foreach=foreach)
    upstream = adam_mini.Adam_mini(
        theirs.named_parameters(), lr=3e-3, betas=betas, eps=1e-8, weight_decay=0.1, dim=24, n_heads=4
    )
    upstream.world_size = 1  # it counts GPUs here, and would ask for a process group on a machine with several
    for step in range(10):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine) * (1 + step)
            other.grad = mine.grad.clone()
        for group in [*optimizer.param_groups, *upstream.param_groups]:
            group["lr"] = 3e-3 * (1 - step / 30)
        optimizer.step()
        upstream.step()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert error(mine.detach(), other.detach()) < 1e-12, (name, step)
