"""The table of call sites against real stacks: two ranks of FSDP2 on CPU, torch's own collectives and optimizers.

On a GPU autograd runs in a thread without Python frames, and torch records its C++ frames; here it has the Python ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils._traceback import CapturedTraceback
from torch.utils.checkpoint import checkpoint

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.memory.origins import Origins


class Stacks(TorchDispatchMode):
    """address -> (op, bytes, stack) of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str, int, list[dict[str, Any]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage().data_ptr() for one in plain((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for one in plain(out):
            if one.untyped_storage().data_ptr() not in before:
                frames = [
                    {"filename": frame.filename, "line": frame.lineno, "name": frame.name}
                    for frame in reversed(CapturedTraceback.extract().summary())
                ]
                storage = one.untyped_storage()
                self.made.append((storage.data_ptr(), str(func), storage.nbytes(), frames))
        return out


def plain(tree: Any) -> list[torch.Tensor]:
    """The tensors in it, out of DTensor."""
    return [getattr(one, "_local_tensor", one) for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.tanh(self.w1(x)))


def trained(rank: int, world: int, optimizer: str) -> dict[str, Any]:
    """One step; the categories of what became gradients and state, and of all operations by category."""
    model = nn.Sequential(Layer(), Layer())
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    made = {
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
        "AdamMini": lambda: AdamMini(model.named_parameters(), lr=1e-3, partition=Partition.per_tensor()),
    }[optimizer]()
    x = torch.randn(4, 16)
    with Stacks() as stacks:
        loss = checkpoint(model[1], model[0](x), use_reentrant=False).sum()
        loss.backward()
        made.step()
    origins = Origins([])
    last: dict[int, str] = {}
    ops: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for address, op, _, frames in stacks.made:
        last[address] = origins.of(frames)
        ops[last[address]][op] += 1
    grads = {param.grad._local_tensor.untyped_storage().data_ptr() for param in model.parameters()}
    states = {
        state[key]._local_tensor.untyped_storage().data_ptr()
        for state in made.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {
        "gradients": {last[address] for address in grads},
        "state": {last[address] for address in states},
        "ops": {category: dict(counts) for category, counts in ops.items()},
    }


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamMini"])
def test_real_stacks_are_known(optimizer: str) -> None:
    found = run(trained, 2, optimizer)[0]
    print(found)
    assert found["state"] == {"optimizer state"}
    assert found["gradients"] == {"reduce-scatter"}, "by stacks alone; a run says which are gradients"
    assert found["ops"].pop("other") == {"aten.sum.default": 1}, "the loss, which is made in this file"
    assert set(found["ops"]) == {"all-gather", "reduce-scatter", "activations", "temporaries", "optimizer state"}
    assert set(found["ops"]["activations"]) >= {"aten.mm.default", "aten.tanh.default"}
    assert set(found["ops"]["temporaries"]) >= {"aten.mm.default", "aten.tanh_backward.default"}
    assert found["ops"]["activations"]["aten.tanh.default"] == 3, "two layers, and one again"
