"""What a rank holds of a model and its optimizer: the storages of parameters, gradients and optimizer state."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SNAPSHOT_KEY = "titan_adam_mini"
"""The key of a memory snapshot under which snapshots.py adds what is held; `titan-adam-mini snapshot` reads it."""


class Held(NamedTuple):
    """A storage, once, under the first tensor that has it.

    Attributes:
        category: "parameters", "gradients" or "optimizer state".
        key: the key of the optimizer's state, such as "exp_avg"; else empty.
        size: in bytes, all of the storage: what FSDP pads, and what gradients share, is in it.
    """

    category: str
    key: str
    address: int
    size: int
    device: torch.device


def held(container: Any) -> list[Held]:
    """All storages of this rank with the model parts and optimizers of a torchtitan ``OptimizersContainer``."""
    found: dict[tuple[torch.device, int], Held] = {}
    for category, key, tensor in _tensors(container):
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            if storage.nbytes():
                there = storage.device, storage.data_ptr()
                found.setdefault(there, Held(category, key, there[1], storage.nbytes(), there[0]))
    return list(found.values())


def _tensors(container: Any) -> Iterator[tuple[str, str, Tensor]]:
    params = [param for part in container.model_parts for param in part.parameters()]
    yield from (("parameters", "", param) for param in params)
    yield from (("gradients", "", param.grad) for param in params if param.grad is not None)
    for optimizer in container.optimizers:
        for state in optimizer.state.values():
            yield from (("optimizer state", key, value) for key, value in state.items() if isinstance(value, Tensor))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with data inside a tensor: out of DTensor and other wrappers, without waiting for any."""
    if isinstance(tensor, DTensor):
        yield from _plain(tensor._local_tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor.detach()
