"""Stochastic rounding of bfloat16 parameters: the same bits for the same seed, step and element on any mesh and engine.

Rounding to nearest loses every update below half a unit in the last place (2^-9 of the value); rounding up with the
probability of the remainder keeps it on average. The random bits are a hash of a counter; there is no generator state.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..sharding import Box

MASK = 0xFFFFFFFF
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
"""2^32 over the golden ratio, and the multipliers of `mix`."""


def seed_of(seed: int, name: str) -> int:
    """The seed of one parameter, 32 bits."""
    return (zlib.crc32(name.encode()) ^ (seed * GOLDEN)) & MASK


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, stored as int64, whose every output bit depends on every input bit."""
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = ((x ^ (x >> 15)) * SECOND) & MASK
    return x ^ (x >> 16)


def key(seed: int, step: int) -> int:
    """The key of one parameter's step, from `seed_of` and the number of the step."""
    return int(mix(torch.tensor((seed + step * GOLDEN) & MASK)))


def indices(shape: tuple[int, ...], box: Box, device: torch.device) -> Tensor:
    """The index of every element of a box in the flattened tensor of `shape`, int64."""
    result = torch.zeros((), dtype=torch.int64, device=device)
    for size, (start, stop) in zip(shape, box, strict=True):
        result = result.unsqueeze(-1) * size + torch.arange(start, stop, device=device)
    return result


def stochastic(values: Tensor, indices: Tensor, key: int) -> Tensor:
    """float32 `values` as bfloat16, rounded up or down at random without bias; NaN and infinity stay."""
    noise = mix((indices & MASK) ^ key ^ mix((indices >> 32) + GOLDEN)) & 0xFFFF
    bits = values.float().view(torch.int32)
    rounded = ((bits + noise.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
