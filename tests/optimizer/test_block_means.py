"""AdamW's second moments, sharded, become the means over blocks: on every mesh, and to one device's bits under FSDP."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from injected import agreed
from meshes import CATALOGUE
from ranks import run
from torch import Tensor

from titan_adam_mini.check.injected import full, make
from titan_adam_mini.check.meshes import DENSE, Placed, draw, factors, full_shapes, layouts
from titan_adam_mini.check.oracle import error
from titan_adam_mini.state import SECOND_MOMENTS


@lru_cache
def elementwise(name: str) -> dict[str, Tensor]:
    """Second moments of very different sizes."""
    shapes = full_shapes(CATALOGUE[name].sizes)
    drawn = draw(shapes, seed=5)
    return {key: value.square() * 10.0 ** (number % 7 - 9) for number, (key, value) in enumerate(drawn.items())}


def means(rank: int, world: int, name: str, dtype: torch.dtype, second_moment: str) -> dict[str, Any]:
    mesh = CATALOGUE[name]
    placed, second = (Placed.decoder(mesh, dtype).fill(elementwise(name)) for _ in range(2))
    optimizer = make("AdamMini", placed.params, mesh.sizes, second_moment=second_moment)
    found = optimizer.block_means({placed.params[key]: value.detach() for key, value in second.params.items()})
    for param, values in found.items():
        for key, value in values.items():
            like = optimizer.state[param][key]
            assert value.shape == like.shape and value.dtype == like.dtype
            assert getattr(value, "placements", None) == getattr(like, "placements", None)
    return {
        f"{name} {key}": full(value) for name, param in placed.params.items() for key, value in found[param].items()
    }


def marked(fast: set[tuple[str, str]], slow: set[tuple[str, str]], names: list[str]) -> list[Any]:
    """Every mesh with every kind of second moment; what is neither in `fast` nor in `slow` is for the night."""

    def marks(pair: tuple[str, str]) -> Any:
        return () if pair in fast else pytest.mark.slow if pair in slow else pytest.mark.nightly

    every = [(name, second_moment) for name in names for second_moment in ("blocks", "channels", "factored")]
    return [pytest.param(*pair, marks=marks(pair)) for pair in every]


FAST = {("FSDP2 x TP 3x2", "channels"), ("FSDP2 x EP 2x2", "factored"), ("TP 3", "blocks")}
SLOW = {
    *(("FSDP2 8", "blocks"), ("HSDP 2x3", "factored"), ("TP 3", "channels"), ("FSDP2 x TP 3x2", "factored")),
    *(("HSDP x TP 2x2x2", "blocks"), ("PP 2", "channels")),
}
MESHES = ["FSDP2 3", "FSDP2 8", "HSDP 2x3", "TP 3", "FSDP2 x TP 3x2", "HSDP x TP 2x2x2", "FSDP2 x EP 2x2", "PP 2"]


@pytest.mark.parametrize(("name", "second_moment"), marked(FAST, SLOW, MESHES))
def test_they_are_the_means(name: str, second_moment: str) -> None:
    sizes = CATALOGUE[name].sizes
    got = agreed(run(means, CATALOGUE[name].world, name, torch.float64, second_moment))
    for key, layout in layouts(sizes, second_moment).items():
        others = factors(sizes).get(key, ()) if second_moment == "factored" else ()
        for suffix, cut in zip(SECOND_MOMENTS, (layout, *others), strict=False):
            want = elementwise(name)[key]
            for dim, tiles in enumerate(cut.dims):
                want = torch.cat([tile.mean(dim, keepdim=True) for tile in want.split(tiles.lengths(), dim)], dim)
            assert error(got.pop(f"{key} {suffix}"), want) < 1e-13, key
    assert not got


@pytest.mark.parametrize(
    ("name", "second_moment"),
    marked(
        {("FSDP2 3", "factored")},
        {("HSDP 2x3", "blocks"), ("FSDP2 8", "factored"), ("FSDP2 3", "channels")},
        ["FSDP2 3", "FSDP2 8", "HSDP 2x3", "PP 2"],
    ),
)
def test_the_bits_are_those_of_one_device(name: str, second_moment: str) -> None:
    assert CATALOGUE[name].sizes == DENSE
    got = agreed(run(means, CATALOGUE[name].world, name, torch.float32, second_moment))
    want = agreed(run(means, 1, "one rank", torch.float32, second_moment))
    assert all(torch.equal(got[key], value) for key, value in want.items())
