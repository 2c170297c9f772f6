"""Sees every collective that a rank starts: op, ranks of its group, elements, dtype, whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Collective:
    """One collective as c10d got it."""

    op: str
    ranks: tuple[int, ...]
    numel: int
    dtype: torch.dtype | None


class Collectives(TorchDispatchMode):
    """`with Collectives() as seen: ...` fills `seen.list`.

    `dist.*` reaches the dispatcher as `c10d::*`, DTensor's own communication as `_c10d_functional::*`; an operation
    on DTensors is passed on to DTensor, which then comes back here with the collectives it decides on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.list: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        namespace, _, op = func._schema.name.partition("::")
        leaves = tree_leaves((args, kwargs)) if namespace in ("c10d", "_c10d_functional") else []
        if ranks := _ranks(leaves):
            tensors = [one for one in leaves if isinstance(one, Tensor)]
            dtype = tensors[0].dtype if tensors else None
            self.list.append(Collective(op, ranks, sum(one.numel() for one in tensors), dtype))
        return func(*args, **(kwargs or {}))

    @property
    def short(self) -> list[tuple[str, tuple[int, ...]]]:
        """(op, ranks) of each."""
        return [(one.op, one.ranks) for one in self.list]


def _ranks(leaves: list[Any]) -> tuple[int, ...]:
    """The global ranks of the group among a call's arguments; empty if it has none (waiting, wrapping)."""
    for one in leaves:
        if isinstance(one, torch.ScriptObject) and one._type().name() == "ProcessGroup":
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(one)))
    names = [one for one in leaves if isinstance(one, str)]
    return tuple(dist.get_process_group_ranks(_resolve_process_group(names[-1]))) if names else ()
