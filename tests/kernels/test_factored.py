"""Factored second moments on one device: sums over columns that any cut leaves as they are, and what they make."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.kernels import Factor, ParamStep, columns, vectorized
from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition.roles import factors
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part

SHAPE = (1001, 37)
GROUP = {"betas": (0.9, 0.95)}
W = "layers.0.feed_forward.w1.weight"


def column_sums(grad: Tensor, ranks: int, step: int, expected: Tensor | None = None) -> Tensor:
    """The sums over columns of `grad`, cut along dim 0 over so many ranks, added rank by rank."""
    layout, _ = factors(tuple(grad.shape))
    total = torch.zeros(layout.grid_shape, dtype=torch.float64)
    if expected is None:
        expected = grad.double().square().mean(-2, keepdim=True)
    state = (expected * (1 - GROUP["betas"][1] ** step)).float()
    for rank in range(ranks):
        plan = BlockPlan.of(layout, Part.of(tuple(grad.shape), [Shard(0)], (ranks,), (rank,)))
        own = tuple(slice(*interval) for interval in plan.own[0])
        factor = Factor(plan, state[tuple(slice(*one) for one in spans(plan))])
        rest = {"exp_avg": grad, "exp_avg_scale": None, "exp_avg_sq": grad, "group": GROUP, "decay": True}
        param_step = ParamStep(
            "w", plan, grad, grad[own], step=torch.tensor(float(step)), factors=(factor, factor), **rest
        )
        offset = columns.rounding_offset(param_step)
        sums = columns.column_sums(grad[own], None if offset is None else offset[plan.parts[0][2]])
        total[tuple(slice(*one) for one in spans(plan))] += sums
    return total


def spans(plan: BlockPlan) -> list[tuple[int, int]]:
    """The blocks of a rank's reach in the whole grid."""
    return [tiles.span(*interval) for tiles, interval in zip(plan.layout.dims, plan.reach, strict=True)]


def sample(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Entries, rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10.0 ** (4 * torch.rand(size, generator=generator) - 6) for size in shape[-2:]]
    return torch.randn(shape, generator=generator) * sizes[0][:, None] * sizes[1]


@pytest.mark.parametrize("shape", [SHAPE, (3, 50, 21), (9, 2)])
def test_a_cut_between_rows_leaves_the_sums_as_they_are(shape: tuple[int, ...]) -> None:
    """In all 53 bits, whatever the number of ranks; and they are the sums."""
    grad = sample(shape)
    want = column_sums(grad, 1, step=3)
    for ranks in (2, 3, 7, 64):
        assert torch.equal(column_sums(grad, ranks, step=3), want), ranks
    exact = grad.double().square().sum(-2, keepdim=True)
    torch.testing.assert_close(want, exact, rtol=1e-9, atol=0)


def test_without_the_quantum_it_would_not() -> None:
    """The first step, where nothing is known: the last of the 53 bits differ, none of float32's 24 do."""
    grad = sample(SHAPE)
    want = column_sums(grad, 1, step=0)
    others = [column_sums(grad, ranks, step=0) for ranks in (2, 3, 7, 64)]
    assert not all(torch.equal(one, want) for one in others), "this test cannot tell"
    assert all(torch.equal(one.float(), want.float()) for one in others)


@pytest.mark.parametrize("jump", [1e-8, 1.0, 1e5])
def test_gradients_may_grow_and_shrink_from_step_to_step(jump: float) -> None:
    grad = sample(SHAPE)
    expected = grad.double().square().mean(0, keepdim=True) / jump
    want = column_sums(grad, 1, step=3, expected=expected)
    assert all(torch.equal(column_sums(grad, ranks, 3, expected), want) for ranks in (2, 7, 64))
    exact = grad.double().square().sum(0, keepdim=True)
    lost = (want - exact).abs() / torch.maximum(exact, expected * SHAPE[0])
    assert lost.max() < 1e-9, "beside the state that the sums are averaged into, nothing"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    grad = sample(SHAPE)
    grad[500, 3] = bad
    sums = column_sums(grad, 3, step=3, expected=sample(SHAPE).double().square().mean(0, keepdim=True))
    assert not sums[0, 3].isfinite() and sums[0, torch.arange(37) != 3].isfinite().all()


def optimizer_of(weight: Tensor, **options: Any) -> tuple[AdamMini, torch.nn.Parameter]:
    param = torch.nn.Parameter(weight.clone())
    return AdamMini([(W, param)], lr=0.1, eps=1e-8, weight_decay=0.0, second_moment="factored", **options), param


def test_a_rank_one_second_moment_is_kept_exactly() -> None:
    """Where the squares of the gradient are an outer product, the update is AdamW's."""
    rows, columns = torch.rand(40, 1) + 0.1, torch.rand(24) * 10 + 0.1
    optimizer, param = optimizer_of(torch.zeros(40, 24))
    other = torch.nn.Parameter(torch.zeros(40, 24))
    adamw = torch.optim.AdamW([other], lr=0.1, eps=1e-8, weight_decay=0.0)
    for step in range(5):
        param.grad = other.grad = rows * columns * (-1.0) ** torch.arange(24) * (1 + step)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (1, 1)])
def test_a_single_column_or_row_is_adamw(shape: tuple[int, int]) -> None:
    optimizer, param = optimizer_of(torch.zeros(shape))
    other = torch.nn.Parameter(torch.zeros(shape))
    adamw = torch.optim.AdamW([other], lr=0.1, eps=1e-8, weight_decay=0.0)
    for step in range(4):
        param.grad = other.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-7)


def test_rows_and_columns_that_never_had_a_gradient_stay() -> None:
    optimizer, param = optimizer_of(torch.ones(5, 4))
    param.grad = torch.zeros(5, 4)
    optimizer.step()
    assert torch.equal(param, torch.ones(5, 4)), "nothing over nothing"
    param.grad[2, 1] = 3.0
    optimizer.step()
    changed = param != 1
    assert changed[2, 1] and changed.sum() == 1 and param.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_are_worked_on_in_pieces(dtype: torch.dtype, param_dtype: torch.dtype, monkeypatch: Any) -> None:
    """The same bits however many rows are taken at a time, with any momentum and with random rounding."""
    found = []
    for chunk in (1 << 18, 700):
        monkeypatch.setattr(vectorized, "CHUNK", chunk)
        optimizer, param = optimizer_of(
            sample((64, 256)).to(param_dtype), momentum_dtype=dtype, stochastic_rounding=True
        )
        for step in range(3):
            param.grad = sample((64, 256), step).to(param_dtype)
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], sample((64, 256)).to(param_dtype))


SHAPES = {
    "tok_embeddings.weight": (32, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.moe.experts.w1": (3, 12, 8),
    "layers.0.attention_norm.weight": (8,),
}


def test_which_parameters_are_factored() -> None:
    blocks = Partition.transformer(n_heads=2, second_moment="factored").assign(SHAPES)
    assert [one.role for one in blocks.values()] == ["token", "query", "experts", "norm"]
    assert [one.second_moments for one in blocks.values()] == [32 + 8 + 1, 8 + 8 + 1, 3 * (12 + 8 + 1), 1]
    experts = blocks["layers.0.moe.experts.w1"]
    assert [layout.grid_shape for layout in experts.layouts] == [(3, 12, 1), (3, 1, 8), (3, 1, 1)]


def test_a_role_factors_single_parameters() -> None:
    blocks = Partition.transformer(n_heads=2, roles={"*.wq.weight": "factored"}).assign(SHAPES)
    assert [len(one.layouts) for one in blocks.values()] == [1, 3, 1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        Partition.transformer(n_heads=2, roles={"*_norm.weight": "factored"}).assign(SHAPES)
    with pytest.raises(ValueError, match="second_moment must be one of blocks, channels, factored, not 'rows'"):
        Partition.transformer(second_moment="rows")


def test_the_layouts_cover_what_they_say() -> None:
    for shape in itertools.product((1, 4), (3, 2), (5,)):
        assert factors(shape) == (BlockLayout.of(shape, 1, None, 1), BlockLayout.of(shape, 1, None, None))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (3, 1, 5), (3, 5, 1)])
def test_a_matrix_of_one_row_or_column_has_one_per_element(shape: tuple[int, ...]) -> None:
    """Row times column over the whole would be the same, at three times the memory."""
    (blocks,) = Partition.transformer(roles={"w": "factored"}).assign({"w": shape}).values()
    assert blocks.factors == () and blocks.layout.grid_shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_what_overflows_is_seen_everywhere(bad: float) -> None:
    """One element too large for a float32 square: no other one takes a step of lr / eps instead."""
    optimizer, param = optimizer_of(torch.ones(16, 8))
    param.grad = sample((16, 8))
    param.grad[3, 2] = bad
    optimizer.step()
    assert param.isnan().all()


def test_a_second_moment_that_is_not_averaged_is_not_rounded_by() -> None:
    """With beta2 = 0 the state of the last step says nothing of this one's."""
    optimizer, param = optimizer_of(torch.zeros(4096, 8), betas=(0.0, 0.0))
    for size in (1.0, 1e-6):
        before = param.detach().clone()
        param.grad = torch.full((4096, 8), size)
        optimizer.step()
    torch.testing.assert_close(before - param, torch.full((4096, 8), 0.1 / 1.01), rtol=1e-4, atol=0)


def test_adamws_moments_are_averaged_whatever_the_state() -> None:
    optimizer, param = optimizer_of(torch.zeros(4096, 8))
    param.grad = torch.full((4096, 8), 100.0)
    optimizer.step()
    second = sample((4096, 8)).square() * 1e-3
    means = optimizer.block_means({param: second})[param]
    torch.testing.assert_close(means["exp_avg_sq_col"], second.mean(0, keepdim=True), rtol=1e-5, atol=0)


def test_state_of_another_kind_is_told_apart() -> None:
    optimizer, _ = optimizer_of(torch.zeros(4, 6))
    blocks = AdamMini([(W, torch.nn.Parameter(torch.zeros(4, 6)))])
    blocks.init_state()
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 6))])
    adamw.param_groups[0]["params"][0].grad = torch.ones(4, 6)
    adamw.step()
    with pytest.raises(ValueError, match=r"exp_avg_sq_col.*second_moment is not factored"):
        optimizer.load_state_dict(blocks.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg_sq_col.*it is AdamW's; convert it"):
        optimizer.load_state_dict(adamw.state_dict())
