"""Momentum in one byte: the definition in numpy, the bound of the error, and every odd run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_adam_mini.kernels.int8 import RUN, TINY, dequantized, fits, quantize, scale_shape

ROUNDING = 1e-4
"""What float32 adds to half a unit: 127 units times a few 2^-24."""


def stored(momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales, in memory that held something else before."""
    values = torch.empty_like(momentum, dtype=torch.int8).fill_(77)
    scale = torch.full(scale_shape(momentum.shape), 7.0)
    quantize(momentum, values, scale)
    return values, scale


def plain(run: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """The definition for one run, one float32 operation after the other."""
    absmax = np.abs(run).max()
    if absmax < TINY:
        return np.zeros(RUN, np.int8), np.float32(0)
    scale, inverse = np.float32(absmax / np.float32(127)), np.float32(np.float32(127) / absmax)
    return np.rint((run * inverse).astype(np.float32)).astype(np.int8), scale


def runs(seed: int, exponent: float, spread: float, count: int = 4) -> Tensor:
    """Finite numbers around 10^exponent, `spread` decades apart."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(count, RUN, generator=generator, dtype=torch.float64) * spread
    sign = torch.randint(2, (count, RUN), generator=generator) * 2 - 1
    return (sign * 10.0 ** (exponent - size)).float()


def halves(seed: int, exponent: int, count: int = 32) -> Tensor:
    """Runs within a last bit of the places where rounding turns: other formulas for the same thing go elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    largest = (1 + torch.rand(count, 1, generator=generator)) * 2.0**exponent
    near = ((torch.arange(RUN) + 0.5) * largest.double() / 127).float()
    towards = torch.randint(-1, 2, (count, RUN), generator=generator) * math.inf
    near = torch.where(towards.isnan(), near, torch.nextafter(near, towards))
    near[:, -1:] = largest
    return near


STEPS_TAKEN = st.builds(runs, st.integers(0, 2**31), st.floats(-46, 38), st.floats(0, 12))


@settings(max_examples=150, deadline=None)
@given(STEPS_TAKEN)
def test_the_error_is_half_a_unit(momentum: Tensor) -> None:
    values, scale = stored(momentum)
    error = (dequantized(values, scale).double() - momentum.double()).abs().amax(-1)
    absmax = momentum.abs().amax(-1)
    kept = absmax >= TINY
    bound = scale.squeeze(-1).double() * (0.5 + ROUNDING)
    assert (error <= torch.where(kept, bound, TINY)).all()
    assert (values.abs().amax(-1)[kept] == 127).all(), "the largest of a run keeps its value"
    assert (scale[~kept] == 0).all() and (values[~kept] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.one_of(STEPS_TAKEN, st.builds(halves, st.integers(0, 2**31), st.integers(-118, 120))))
def test_it_is_the_definition_to_the_bit(momentum: Tensor) -> None:
    values, scale = stored(momentum)
    for row, (q, s) in enumerate(map(plain, momentum.numpy())):
        assert np.array_equal(values[row].numpy(), q) and scale[row, 0].item() == s


def test_halves_go_to_the_even_neighbour() -> None:
    run = torch.zeros(1, RUN)
    run[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    values, scale = stored(run)
    assert values[0, :6].tolist() == [127, 0, 2, 2, 0, -2] and scale.item() == 1


@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-130, 2.0**-126, TINY * (1 - 2**-24), 0.0, -0.0])
def test_runs_too_small_for_a_scale_are_zero(largest: float) -> None:
    """127 / absmax would overflow there, and 0 * inf is not a number."""
    run = torch.zeros(2, RUN)
    run[0, 3], run[1] = largest, -largest
    values, scale = stored(run)
    assert not values.any() and not scale.any()
    assert not dequantized(values, scale).signbit().any()


def test_the_smallest_and_the_largest_scale() -> None:
    largest = torch.finfo(torch.float32).max * (1 - 2**-22)  # above, 127 * (absmax / 127) may round to infinity
    values, scale = stored(torch.tensor([[TINY], [largest], [-largest]]).expand(3, RUN))
    assert (scale >= torch.finfo(torch.float32).tiny).all(), "never denormal"
    assert values[:, 0].tolist() == [127, 127, -127]
    assert dequantized(values, scale).isfinite().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_run_nan_and_no_other(odd: float) -> None:
    momentum = torch.randn(2, 3 * RUN)
    momentum[1, RUN + 5] = odd
    after = dequantized(*stored(momentum)).isnan().unflatten(-1, (-1, RUN))
    assert after[1, 1].all() and int(after.sum()) == RUN


def test_negative_zero_and_what_rounds_to_zero_come_back_positive() -> None:
    momentum = torch.full((1, RUN), -0.0)
    momentum[0, 0], momentum[0, 1] = 1.0, -1e-6
    after = dequantized(*stored(momentum))
    assert after[0, 1:].eq(0).all() and not after.signbit().any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "a slice of columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row for all": lambda x: x[:1].expand_as(x),
    "three dims, permuted": lambda x: x.unflatten(0, (2, -1)).permute(1, 0, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(name: str) -> None:
    momentum = LAYOUTS[name](torch.randn(6, 2 * RUN))
    values, scale = stored(momentum)
    again, other = stored(momentum.contiguous())
    assert torch.equal(values, again) and torch.equal(scale, other)
    assert torch.equal(dequantized(values, scale), dequantized(again, other))
    there = torch.empty(3 * scale.shape[0], *scale.shape[1:])[::3]
    quantize(momentum, LAYOUTS[name](torch.zeros(6, 2 * RUN, dtype=torch.int8)).clone(), there)
    assert torch.equal(there, scale)


@pytest.mark.parametrize("shape", [(0, 2 * RUN), (3, 0), (2, 0, RUN), (0, 0)])
def test_nothing_is_fine(shape: tuple[int, ...]) -> None:
    """A rank may have no rows, or no columns, of a tensor that has some."""
    values, scale = stored(torch.zeros(shape))
    assert dequantized(values, scale).shape == shape


def test_which_tensors_are_kept_so() -> None:
    assert all(map(fits, [(1, RUN), (5, 3 * RUN), (2, 3, RUN)]))
    assert not any(map(fits, [(RUN,), (RUN, 3), (4, RUN + 1), (4, 0), (), (RUN, RUN // 2)]))
