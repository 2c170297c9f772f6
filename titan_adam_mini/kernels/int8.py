"""Momentum in one byte: int8 values and one float32 scale per run of columns.

A run is RUN consecutive elements of the last dim, so it never crosses a row. Which tensors are stored as int8 depends
only on their global shape. For a run `m` of float32 numbers, with every operation rounded to float32:

    absmax = max |m|                        NaN if any of them is
    scale  = absmax / 127                   0 if absmax < TINY
    q      = round(m * (127 / absmax))      half to even; all 0 if absmax is below TINY, infinite or NaN
    m      ~ q * scale

So a NaN or infinity anywhere in a run makes the entire run NaN (0 * NaN and 0 * inf), and -0 becomes +0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RUN = 128
"""Elements per scale: 4 bytes for 128 add 0.03 bytes per parameter."""
TINY = 2.0**-119
"""From here on `127 / absmax` does not overflow and `absmax / 127` is not denormal (flushed to 0 by some hardware)."""


def fits(shape: Sequence[int]) -> bool:
    """Whether momentum of this global shape can be int8: two or more dims, and rows that are a multiple of RUN."""
    return len(shape) >= 2 and shape[-1] > 0 and shape[-1] % RUN == 0


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of int8 values of `shape`."""
    return (*shape[:-1], shape[-1] // RUN)


def dequantized(values: Tensor, scale: Tensor) -> Tensor:
    """The momentum as float32, in the memory layout of `values`."""
    wide = torch.empty_like(values, dtype=torch.float32).copy_(values)
    wide.unflatten(-1, (-1, RUN)).mul_(scale.unsqueeze(-1))
    return wide


def quantize(momentum: Tensor, values: Tensor, scale: Tensor) -> None:
    """Round float32 `momentum` into `values` and `scale`. The error is at most half a `scale`."""
    runs = momentum.unflatten(-1, (-1, RUN))
    absmax = runs.abs().amax(-1)
    # A tensor: torch computes number / tensor, and on CUDA also tensor / number, as a product with the reciprocal.
    largest = torch.full_like(absmax, 127)
    scale.copy_(torch.where(absmax < TINY, 0.0, absmax / largest))
    inverse = torch.where(absmax >= TINY, largest / absmax, 0.0)
    rounded = (runs * inverse.unsqueeze(-1)).round_().nan_to_num_(0.0)
    values.copy_(rounded.flatten(-2))
