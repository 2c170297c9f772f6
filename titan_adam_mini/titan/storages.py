"""The storages of a rank's parameters, gradients and optimizer state."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SNAPSHOT_KEY = "titan_adam_mini"
"""The key under which snapshots.py adds storages to a memory snapshot; `titan-adam-mini snapshot` reads it."""


class Storage(NamedTuple):
    """A storage, listed once, under the first tensor that uses it.

    Attributes:
        category: "parameters", "gradients" or "optimizer state".
        key: the key of the optimizer state, such as "exp_avg"; else empty.
        size: of the entire storage in bytes, including FSDP's padding and memory shared by gradients.
    """

    category: str
    key: str
    address: int
    size: int
    device: torch.device


def storages(container: Any) -> list[Storage]:
    """All storages of this rank, from the model parts and optimizers of a torchtitan ``OptimizersContainer``."""
    found: dict[tuple[torch.device, int], Storage] = {}
    for category, key, tensor in _tensors(container):
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            if storage.nbytes():
                there = storage.device, storage.data_ptr()
                found.setdefault(there, Storage(category, key, there[1], storage.nbytes(), there[0]))
    return list(found.values())


def _tensors(container: Any) -> Iterator[tuple[str, str, Tensor]]:
    params = [param for part in container.model_parts for param in part.parameters()]
    yield from (("parameters", "", param) for param in params)
    yield from (("gradients", "", param.grad) for param in params if param.grad is not None)
    for optimizer in container.optimizers:
        for state in optimizer.state.values():
            yield from (("optimizer state", key, value) for key, value in state.items() if isinstance(value, Tensor))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with data inside a tensor: unwrapped from DTensor and other wrappers, without waiting."""
    if isinstance(tensor, DTensor):
        yield from _plain(tensor._local_tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor.detach()
