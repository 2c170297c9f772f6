"""The measure against float64 arithmetic block by block, and a window at a time against all at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import inf, isinf, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_adam_mini import Partition
from titan_adam_mini.inspect import Loss, Moments, inspect
from titan_adam_mini.inspect.estimates import Estimate, estimates
from titan_adam_mini.inspect.measure import measure
from titan_adam_mini.layout import BlockLayout

SHAPES = {
    "layers.0.attention.wq.weight": (12, 10),
    "layers.0.attention.wk.weight": (6, 10),
    "layers.0.feed_forward.w2.weight": (10, 14),
    "layers.0.moe.experts.w1": (3, 5, 7),
    "layers.0.attention.wqkv_unknown": (4, 3, 2, 5),
    "layers.0.norm.weight": (11,),
    "transformer.h.0.attn.c_attn.weight": (8, 24),
    "scale": (),
}
PARTITION = Partition.transformer(
    n_heads=4, n_kv_heads=2, roles={"wqkv_unknown": "convolution", "scale": "norm", "c_attn.weight": "rows:2"}
)
OPTIONS: dict[str, Any] = {"step": 7, "betas": (0.9, 0.95), "eps": 1e-8}


def random(shape: tuple[int, ...], spread: float = 1.0) -> Tensor:
    """Second moments as a run has them: positive, over a few decades, not even in any direction."""
    values = 1e-9 * torch.exp(spread * torch.randn(shape))
    for dim, size in enumerate(shape):
        values *= torch.exp(spread * torch.randn([size if one == dim else 1 for one in range(len(shape))]))
    return values


def blocks(layout: BlockLayout) -> Iterator[tuple[slice, ...]]:
    ranges = [[slice(lo, lo + n) for lo, n in zip(one.starts(), one.lengths(), strict=True)] for one in layout.dims]
    yield from product(*ranges)


def averaged(values: Tensor, layout: BlockLayout) -> Tensor:
    new = torch.empty_like(values)
    for block in blocks(layout):
        new[block] = values[block].mean()
    return new


def hat(second: Tensor, estimate: Estimate) -> Tensor:
    """By its definition: means over blocks; factored, matrix by matrix."""
    if len(estimate.layouts) == 1:
        return averaged(second, estimate.layouts[0])
    matrices = second.reshape(-1, *second.shape[-2:])
    factored = [one.mean(1)[:, None] * one.mean(0)[None] / one.mean() for one in matrices]
    return torch.stack(factored).reshape(second.shape)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", SHAPES)
def test_every_candidate_against_arithmetic(name: str) -> None:
    found = estimates(PARTITION, SHAPES)[name]
    v, m = random(SHAPES[name]), 1e-5 * torch.randn(SHAPES[name])
    losses = measure(Moments.of(name, v, m, **OPTIONS), found)
    v, m = v.double(), m.double() / (1 - 0.9**7)
    own = m / (torch.sqrt(v / (1 - 0.95**7)) + 1e-8)
    assert set(losses) == set(found) and {"default", "tensor", "elementwise"} <= set(losses)
    assert ("factored" in losses) == (v.ndim in (2, 3))
    for candidate, estimate in found.items():
        loss, guess = losses[candidate], hat(v, estimate)
        noise = float(((v / guess - 1) ** 2).mean())
        new = m / (torch.sqrt(guess / (1 - 0.95**7)) + 1e-8)
        assert loss.noise == pytest.approx(noise, rel=1e-9, abs=1e-14), candidate
        assert loss.rms_ratio == pytest.approx(float(new.norm() / own.norm()), rel=1e-9), candidate
        assert loss.distance == pytest.approx(float((new - own).norm() / own.norm()), rel=1e-9, abs=1e-9), candidate
        assert isinf(loss.snr) == (candidate == "elementwise" or estimate.elementwise)


def test_one_block_has_the_papers_ratio_and_many_have_its_mean() -> None:
    v = random((6, 40))
    found = estimates(PARTITION, {**SHAPES, "wo.weight": (6, 40)})["wo.weight"]
    losses = measure(Moments.of("wo.weight", v), found)
    v = v.double()
    assert (
        losses["tensor"].snr == losses["tensor"].block_snr == pytest.approx(float(v.mean() ** 2 / v.var(correction=0)))
    )
    rows = v.mean(1) ** 2 / v.var(1, correction=0)
    assert losses["rows"].block_snr == pytest.approx(float(rows.mean()))
    assert losses["rows"].snr == pytest.approx(float(1 / (1 / rows).mean()))
    assert losses["rows"].rms_ratio is None and losses["rows"].distance is None


def test_what_is_even_is_seen_where_it_is_even() -> None:
    """Constant rows, constant columns, an outer product, constant heads, a constant; exact in one way each."""
    row, column = torch.rand(12, 1) + 0.1, torch.rand(1, 10) + 0.1
    heads = (torch.rand(4, 1) + 0.1).repeat_interleave(3, 0)
    ones = torch.ones(12, 10)
    name = "layers.0.attention.wq.weight"
    found = estimates(PARTITION, SHAPES)[name]
    exact = {}
    for told, v in (
        ("rows", row * ones),
        ("columns", column * ones),
        ("outer product", row * column),
        ("heads", heads * ones),
        ("constant", 0.3 * ones),
    ):
        losses = measure(Moments.of(name, v), found)
        exact[told] = {candidate for candidate, loss in losses.items() if loss.snr == inf}
    always = {"elementwise", "factored"}
    assert exact["rows"] == {"rows"} | always
    assert exact["columns"] == {"columns"} | always
    assert exact["outer product"] == always
    assert exact["heads"] == {"default", "heads", "rows"} | always
    assert exact["constant"] == set(found)


def test_each_expert_is_factored_by_itself() -> None:
    v = torch.rand(3, 5, 1) * torch.rand(3, 1, 7)
    name = "layers.0.moe.experts.w1"
    found = estimates(PARTITION, SHAPES)[name]
    assert measure(Moments.of(name, v), found)["factored"].snr == inf
    assert found["factored"].entries == 3 * (5 + 7 + 1)


def test_tokens_that_were_never_seen_do_not_count() -> None:
    v = torch.rand(8, 12) + 0.1
    padded = torch.cat([v, torch.zeros(30, 12)])
    m = torch.randn(8, 12)
    shapes = {"output.weight": (8, 12)}, {"output.weight": (38, 12)}
    few, many = (estimates(Partition.transformer(), one)["output.weight"] for one in shapes)
    alone = measure(Moments.of("output.weight", v, m, **OPTIONS), few)
    beside = measure(Moments.of("output.weight", padded, torch.cat([m, torch.zeros(30, 12)]), **OPTIONS), many)
    for candidate in ("rows", "factored"):
        assert beside[candidate].noise == pytest.approx(alone[candidate].noise)
        assert beside[candidate].distance == pytest.approx(alone[candidate].distance)
    assert beside["tensor"].noise > alone["tensor"].noise, "they do lower the mean of a block that holds others"


@pytest.mark.parametrize(
    "window", [7, 33, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 5, 16, 100))]
)
def test_windows_that_cut_blocks_give_what_all_at_once_gives(window: int) -> None:
    for name, shape in SHAPES.items():
        found = estimates(PARTITION, SHAPES)[name]
        v, m = random(shape), torch.randn(shape)
        whole = measure(Moments.of(name, v, m, **OPTIONS), found)
        seen: list[int] = []

        def read(box: tuple[tuple[int, int], ...], v: Tensor = v, seen: list[int] = seen) -> Tensor:
            part = v[tuple(slice(*interval) for interval in box)]
            seen.append(part.numel())
            return part

        other = Moments.of(name, v, m, **OPTIONS)
        cut = tuple((0, size) for size in shape)
        if shape:  # as two ranks of unequal size store it
            cut = ((0, 2), *cut[1:]), ((2, shape[0]), *cut[1:])
            other = Moments(name, shape, read, other.first, stored=cut, **OPTIONS)
        for candidate, loss in measure(other, found, window).items():
            for field in ("noise", "block_snr", "rms_ratio", "distance"):
                want = getattr(whole[candidate], field)
                assert getattr(loss, field) == pytest.approx(want, rel=1e-9, abs=1e-12), (name, candidate, field)
        assert not shape or (max(seen) <= window and sum(seen) == 2 * v.numel())


def test_losses_add_up_over_parameters() -> None:
    names = ["layers.0.wo.weight", "layers.1.wo.weight"]
    moments = [Moments.of(name, random((6, 8)), torch.randn(6, 8), **OPTIONS) for name in names]
    inspection = inspect(moments, Partition.transformer())
    (pattern,) = inspection.patterns
    one, other = (inspection.losses[name]["default"] for name in names)
    assert pattern.names == tuple(names) and pattern.default.entries == 12
    assert pattern.default.noise == pytest.approx((one.noise + other.noise) / 2)
    assert pattern.default.distance == pytest.approx(
        sqrt((one.difference + other.difference) / (one.update + other.update))
    )
    assert Loss() + one == one


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_run_that_has_diverged_is_told(value: float) -> None:
    v = torch.ones(4, 4)
    v[2, 1] = value
    with pytest.raises(ValueError, match=r"wo.weight has second moments that are not finite"):
        inspect([Moments.of("wo.weight", v)], Partition.transformer())
