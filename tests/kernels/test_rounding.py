"""Random rounding to bfloat16: neighbours only, right on average, the same bits for the same element everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_adam_mini import AdamMini
from titan_adam_mini.kernels.rounding import indices, key, mix, seed_of, stochastic

DEVICE = torch.device("cpu")
UNIT = 2.0**-7
"""Between neighbours in [1, 2)."""


def places(count: int) -> Tensor:
    return torch.arange(count)


def around(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 next to `values`, towards zero and away from it, by cutting bits off."""
    bits = values.view(torch.int32) & -0x10000
    exact = bits == values.view(torch.int32)
    return bits.view(torch.float32), torch.where(exact, bits, bits + 0x10000).view(torch.float32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_neighbours_only(numbers: list[float], seed: int) -> None:
    values = torch.tensor(numbers)
    got = stochastic(values, places(len(values)), key(seed, 1)).float()
    low, high = around(values)
    assert ((got == low) | (got == high)).all()
    assert torch.equal(got.signbit(), values.signbit())


def test_not_a_number_and_infinity_stay() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]).repeat(1000)
    got = stochastic(values, places(len(values)), key(3, 5))
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got.float().nan_to_num(9.0), values.nan_to_num(9.0))
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32).repeat(1000)
    assert stochastic(odd, places(len(odd)), key(3, 5)).isnan().all(), "whatever the other bits of a NaN are"


@pytest.mark.parametrize("part", [1 / 65536, 0.01, 0.25, 0.5, 0.9, 65535 / 65536])
@pytest.mark.parametrize("sign", [1, -1])
def test_right_on_average(part: float, sign: int) -> None:
    """Over elements and over steps: within five standard deviations of the value itself."""
    count, steps = 20_000, 10
    values = torch.full((count,), sign * (1 + part * UNIT))
    away = sum(
        (stochastic(values, places(count), key(seed_of(0, "w"), step)).float().abs() > 1).sum().item()
        for step in range(1, steps + 1)
    )
    n = count * steps
    assert abs(away - n * part) <= 5 * math.sqrt(n * part * (1 - part)) + 1


def test_elements_steps_names_and_seeds_differ() -> None:
    values = torch.full((4096,), 1 + UNIT / 2)
    draws = {
        (name, seed, step): stochastic(values, places(4096), key(seed_of(seed, name), step)) > 1
        for name in ("a", "b")
        for seed in (0, 1)
        for step in (1, 2)
    }
    flat = torch.stack(list(draws.values())).double()
    together = torch.corrcoef(flat) - torch.eye(len(flat))
    assert together.abs().max() < 5 / math.sqrt(4096)
    neighbours = torch.corrcoef(torch.stack([flat[:, 1:].flatten(), flat[:, :-1].flatten()]))[0, 1]
    assert neighbours.abs() < 5 / math.sqrt(flat.numel())


def test_the_hash_is_a_bijection_and_knows_elements_past_the_32nd_bit() -> None:
    assert len(set(mix(torch.arange(1 << 16)).tolist())) == 1 << 16
    values = torch.full((1000,), 1 + UNIT / 2)
    near, far = (stochastic(values, places(1000) + base, key(1, 1)) for base in (0, 1 << 32))
    assert not torch.equal(near, far)


def test_the_same_bits_whatever_the_shard() -> None:
    shape = (6, 5, 4)
    whole = torch.randn(shape)
    want = stochastic(whole, indices(shape, tuple((0, size) for size in shape), DEVICE), key(7, 2))
    for box in (((0, 2), (0, 5), (0, 4)), ((3, 6), (1, 4), (2, 3)), ((5, 6), (4, 5), (0, 4)), ((2, 2), (0, 5), (0, 4))):
        here = tuple(slice(*one) for one in box)
        assert torch.equal(stochastic(whole[here], indices(shape, box, DEVICE), key(7, 2)), want[here])
    assert indices((), (), DEVICE).item() == 0


def trained(steps: int, lr: float, **options: Any) -> Tensor:
    """bfloat16 ones, pulled down by a gradient of one."""
    param = torch.nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
    optimizer = AdamMini([("w1.weight", param)], lr=lr, weight_decay=0.0, **options)
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return param.detach().float()


def test_small_updates_arrive_on_average_and_are_lost_without_it() -> None:
    steps, lr = 50, 2.0**-13
    assert torch.equal(trained(steps, lr), torch.ones(64, 32)), "to nearest, nothing ever moves"
    random = trained(steps, lr, stochastic_rounding=True)
    assert random.mean().item() == pytest.approx(1 - steps * lr, abs=4e-4)
    assert torch.equal(random, trained(steps, lr, stochastic_rounding=True))
    assert not torch.equal(random, trained(steps, lr, stochastic_rounding=True, seed=1))


def test_float32_parameters_are_not_rounded() -> None:
    both = []
    for on in (False, True):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 64).view(4, 16))
        optimizer = AdamMini([("w1.weight", param)], stochastic_rounding=on)
        param.grad = param.detach() ** 2
        optimizer.step()
        both.append(param.detach())
    assert torch.equal(*both)
