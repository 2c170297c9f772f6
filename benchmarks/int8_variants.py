"""Other ways to store momentum in int8, compared by loss: put in the place of `kernels.int8`'s by the environment.

torchtitan imports this file in place of `titan_adam_mini.titan` (`--experimental.custom_import`). It serves the engine
"foreach" alone.
"""

import os

import torch
from torch import Tensor

import titan_adam_mini.titan  # noqa: F401
from titan_adam_mini.kernels import int8
from titan_adam_mini.kernels.int8 import RUN


def _shares(momentum: Tensor, scale: Tensor) -> Tensor:
    """Momentum over the absolute maximum of its run, which `scale` keeps."""
    runs = momentum.unflatten(-1, (-1, RUN))
    absmax = runs.abs().amax(-1)
    scale.copy_(absmax)
    return torch.where(absmax.unsqueeze(-1) > 0, runs / absmax.unsqueeze(-1), 0.0)


def stochastic(momentum: Tensor, values: Tensor, scale: Tensor) -> None:
    """Linear, rounded up or down at random."""
    shares = _shares(momentum, scale) * 127
    values.copy_((shares + torch.rand_like(shares)).floor_().clamp_(-127, 127).flatten(-2))
    scale.div_(127)


def companded(momentum: Tensor, values: Tensor, scale: Tensor) -> None:
    """The root of the share is stored: finer steps near zero."""
    shares = _shares(momentum, scale)
    values.copy_((shares.sign() * shares.abs().sqrt() * 127).round_().flatten(-2))


def expanded(values: Tensor, scale: Tensor) -> Tensor:
    """Of `companded`."""
    shares = values.float().unflatten(-1, (-1, RUN)) / 127
    return (shares * shares.abs() * scale.unsqueeze(-1)).flatten(-2)


variant = os.environ.get("INT8_VARIANT", "")
if variant == "stochastic":
    int8.quantize = stochastic
elif variant == "companded":
    int8.quantize, int8.dequantized = companded, expanded
elif variant:
    raise ValueError(f"INT8_VARIANT={variant!r} is unknown: stochastic or companded")
