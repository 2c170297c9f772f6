"""Where the engines' tests run, and a tensor whose data are inside another."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("TITAN_ADAM_MINI_TEST_DEVICE", "cpu")
"""cuda: `TITAN_ADAM_MINI_TEST_DEVICE=cuda pytest tests/kernels`."""


class Wrapper(Tensor):
    """As torchao's weights for the float8 all-gather: no storage of its own, one inner tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Wrapper:
        return Wrapper(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        args = [one.inner if isinstance(one, Wrapper) else one for one in args]
        return function(*args, **(kwargs or {}))
