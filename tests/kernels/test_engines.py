"""Every engine against the reference over several steps, on shapes, strides and dtypes of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from titan_adam_mini.check.engines import (
    CPU_FALLBACKS,
    ENGINES,
    GROUP,
    LAYOUTS,
    SimulatedRank,
    differences,
    engine_of,
    gradients,
    reference_engine,
    step,
)
from titan_adam_mini.kernels import ParamStep
from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part

STEPS = 3


def pair(engine: str, layouts: dict[str, BlockLayout] = LAYOUTS, **options: Any) -> tuple[SimulatedRank, SimulatedRank]:
    """The same parameters for an engine and for the reference."""
    return SimulatedRank(layouts, engine_of(engine), **options), SimulatedRank(layouts, reference_engine(), **options)


def moved(two: tuple[SimulatedRank, SimulatedRank], number: int, dtype: torch.dtype, spoil: Any = None) -> None:
    grads = gradients({param_step.name: param_step.plan.layout for param_step in two[0].param_steps}, number, dtype)
    if spoil is not None:
        spoil(grads)
    for simulated in two:
        simulated.give(grads)
        step([simulated])


def compare(two: tuple[SimulatedRank, SimulatedRank], left: set[str] = CPU_FALLBACKS) -> None:
    assert differences(*two, left) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_layouts(engine: str, dtype: torch.dtype) -> None:
    two = pair(engine, dtype=dtype)
    for number in range(STEPS):
        moved(two, number, dtype)
        compare(two)
    assert any(
        not torch.equal(a.param, b.param) for a, b in zip(two[0].param_steps, pair(engine)[0].param_steps, strict=True)
    )


SMALL = {name: layout for name, layout in LAYOUTS.items() if name not in ("long rows", "large heads")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "momentum", "grad"),
    [
        (torch.float32, torch.int8, torch.float32),
        (torch.bfloat16, torch.int8, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float32),
        *(
            pytest.param(*dtypes, marks=pytest.mark.slow)
            for dtypes in (
                (torch.float32, torch.bfloat16, torch.float32),
                (torch.float32, None, torch.bfloat16),
                (torch.float32, torch.float64, torch.float32),
                (torch.bfloat16, torch.float32, torch.float32),
                (torch.float64, torch.float32, torch.float64),
                (torch.float64, torch.int8, torch.float64),
            )
        ),
    ],
)
def test_mixed_dtypes(engine: str, dtype: torch.dtype, momentum: torch.dtype | None, grad: torch.dtype) -> None:
    two = pair(engine, SMALL, dtype=dtype, momentum=momentum)
    # int8 runs lie along the rows; where the lines are something else, torch's operations are left to it.
    left = CPU_FALLBACKS | ({"elements"} if momentum == torch.int8 else set())
    for number in range(STEPS):
        moved(two, number, grad)
        compare(two, left)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "momentum", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.bfloat16, torch.int8))]
)
def test_tensors_that_are_not_contiguous(engine: str, momentum: torch.dtype | None) -> None:
    """Parameters stored transposed, then gradients as well; padded rows; every second element."""

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x.clone()

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.ndim > 1 else x.clone()

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x.clone()

    flat = {name: layout for name, layout in SMALL.items() if len(layout.shape) < 3}
    for for_params, for_grads in [
        (transposed, transposed),
        (transposed, torch.clone),
        (torch.clone, transposed),
        (padded, spread),
        (spread, padded),
    ]:
        two = pair(engine, flat, momentum=momentum, store=for_params)
        for simulated in two:
            simulated.store = for_grads
        for number in range(2):
            moved(two, number, torch.float32)
            compare(two, CPU_FALLBACKS | {"elements", "whole", "no rows"})


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_regular_are_copied(engine: str) -> None:
    layouts = {"elements": BlockLayout.of((6, 5, 4), 1, 1, 1), "whole": BlockLayout.of((6, 5, 4), 1, None, None)}
    two = pair(engine, layouts)
    for simulated in two:
        simulated.store = lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for number in range(3):
        moved(two, number, torch.float32)
        compare(two)


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_of_their_own_and_lr_as_a_tensor(engine: str) -> None:
    groups = [
        {**GROUP, "lr": torch.tensor(3e-2)},
        {**GROUP, "betas": (0.0, 0.5), "maximize": True},
        {**GROUP, "eps": 1e-3, "weight_decay": 0.0},
        {**GROUP, "betas": (0.95, 0.0)},
    ]
    two = pair(engine, SMALL, groups=groups)
    for number in range(STEPS):
        groups[0]["lr"].fill_(3e-2 / (1 + number))
        groups[1]["lr"] = 1e-2 * number
        moved(two, number, torch.float32)
        compare(two)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("momentum", "bad"),
    [
        (None, float("nan")),
        (None, 1e38),
        (torch.int8, float("inf")),
        pytest.param(None, -float("inf"), marks=pytest.mark.slow),
        pytest.param(torch.int8, float("nan"), marks=pytest.mark.slow),
        pytest.param(torch.int8, 1e38, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_poisons_what_it_does_in_the_reference(
    engine: str, momentum: torch.dtype | None, bad: float
) -> None:
    def spoil(grads: dict[str, Tensor]) -> None:
        for grad in grads.values():
            if grad.numel():
                grad.view(-1)[grad.numel() * 2 // 3] = bad

    two = pair(engine, SMALL, momentum=momentum)
    left = CPU_FALLBACKS | ({"elements"} if momentum == torch.int8 else set())
    for number in range(3):
        moved(two, number, torch.float32, spoil if number == 1 else None)
        compare(two, left)
    rows = two[0].named("rows").param
    assert int((~rows.isfinite()).any(1).sum()) == (0 if bad == 1e38 else 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F7FFFFF, 0x7F800000])
def test_bfloat16_rounds_whatever_bits_there_are(engine: str, bits: int) -> None:
    """A NaN that overflowed while it is rounded would become zero."""
    two = pair(engine, {"rows": LAYOUTS["rows"]}, dtype=torch.bfloat16)
    odd = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    moved(two, 0, torch.float32, lambda grads: grads["rows"][5].fill_(odd))
    compare(two)
    assert odd.isfinite() or not two[0].param_steps[0].param[5].isfinite().any()


@pytest.mark.parametrize("engine", ENGINES)
def test_missing_gradients(engine: str) -> None:
    """Another parameter each step has none: nothing of it moves, the others do."""
    two = pair(engine, SMALL)
    names = list(SMALL)
    for number in range(6):
        before = {param_step.name: param_step.param.clone() for param_step in two[0].param_steps}
        gone = set(names[number::3])

        def spoil(grads: dict[str, Any], gone: set[str] = gone) -> None:
            grads.update(dict.fromkeys(gone))

        moved(two, number, torch.float32, spoil)
        compare(two)
        for param_step in two[0].param_steps:
            if param_step.param.numel():
                assert torch.equal(param_step.param, before[param_step.name]) == (param_step.name in gone), (
                    param_step.name
                )


@pytest.mark.parametrize("engine", ENGINES)
def test_random_rounding_has_the_same_bits(engine: str) -> None:
    """Where there is nothing to sum, float32 values are those of the reference, and so is every rounded bit."""
    layouts = {"elements": LAYOUTS["elements"], "bias": LAYOUTS["bias"], "more": BlockLayout.of((20, 50), 1, 1)}
    two = pair(engine, layouts, dtype=torch.bfloat16, momentum=torch.float32, seed=7)
    plain = pair(engine, layouts, dtype=torch.bfloat16, momentum=torch.float32)
    for number in range(STEPS):
        moved(two, number, torch.bfloat16)
        moved(plain, number, torch.bfloat16)
    for mine, other, nearest in zip(*(simulated.param_steps for simulated in (*two, plain[0])), strict=True):
        differ = int((mine.param != other.param).sum())
        assert differ <= 1, f"{mine.name}: {differ} of {mine.param.numel()}"
        assert not torch.equal(mine.param, nearest.param)
    everything = pair(engine, SMALL, dtype=torch.bfloat16, momentum=torch.bfloat16, seed=7)
    for number in range(2):
        moved(everything, number, torch.bfloat16)
    compare(everything)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_rounding_of_elements_beyond_the_four_thousand_millionth(engine: str) -> None:
    """One row of a huge tensor, in the middle of which the elements' numbers get a 33rd bit."""
    layout = BlockLayout.of((66_000, 66_000), 1, None)
    plan = BlockPlan.of(layout, Part.of(layout.shape, [Shard(0)], (66_000,), (2**32 // 66_000,)))
    results = []
    for one in (engine_of(engine), engine_of("foreach")):
        generator = torch.Generator().manual_seed(0)
        param, grad = (torch.randn(1, 66_000, generator=generator).bfloat16() for _ in range(2))
        state = {"exp_avg": torch.zeros(1, 66_000), "exp_avg_sq": torch.zeros(1, 1), "step": torch.zeros(())}
        param_step = ParamStep(
            name="w", plan=plan, param=param, grad=grad, exp_avg_scale=None, group=GROUP, decay=True, seed=1, **state
        )
        one.update([param_step])
        results.append(param)
    assert int((results[0] != results[1]).sum()) <= 20
