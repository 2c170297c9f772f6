"""int8 and bfloat16 momentum, and random rounding, on every kind of mesh: one device's bits, or a unit of int8."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from injected import on_mesh, on_one_device
from meshes import CUT_RUNS, MESHES, RUNS, WITH_RUNS
from ranks import RankError, run

from titan_adam_mini.check.injected import STEPS, make
from titan_adam_mini.check.meshes import Placed, full_shapes
from titan_adam_mini.check.oracle import error
from titan_adam_mini.kernels.int8 import RUN

BITS = [name for name, mesh in WITH_RUNS.items() if mesh.sizes == RUNS and {*mesh.axes} <= {"rep", "dp"}]
FAST = {("FSDP2 3, runs", "int8, random"), ("HSDP 2x3, runs", "int8")}
FEW = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"momentum_dtype": torch.int8},
    "bfloat16": {"momentum_dtype": torch.bfloat16},
    "int8, random": {"momentum_dtype": torch.int8, "stochastic_rounding": True, "seed": 3},
}


@lru_cache
def alone(option: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    return on_one_device(RUNS, dtype=dtype, steps=FEW, **OPTIONS[option])


def pairs() -> list[Any]:
    """Every mesh and option; one option is enough for a mesh that another one is much like."""
    like = {"FSDP2 2, runs", "FSDP2 4, runs", "HSDP 2x2, runs"}
    return [
        pytest.param(
            name,
            option,
            marks=()
            if (name, option) in FAST
            else pytest.mark.nightly
            if name in like and option != "bfloat16"
            else pytest.mark.slow,
        )
        for name in BITS
        for option in OPTIONS
    ]


@pytest.mark.parametrize(("name", "option"), pairs())
def test_fsdp_and_hsdp_have_the_bits_of_one_device(name: str, option: str) -> None:
    dtype = torch.bfloat16 if "random" in option else torch.float32
    want = alone(option, dtype)
    got, _ = on_mesh(name, dtype=dtype, steps=FEW, **OPTIONS[option])
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        for key, value in want[kind].items():
            assert got[kind][key].dtype == value.dtype and torch.equal(got[kind][key], value), (kind, key)


def test_the_options_matter() -> None:
    """Or the bits above would say nothing."""
    plain = on_one_device(RUNS, dtype=torch.float32, steps=FEW)["exp_avg"]
    for option in ("int8", "bfloat16"):
        assert not torch.equal(alone(option, torch.float32)["exp_avg"]["output.weight"].float(), plain["output.weight"])
    nearest = on_one_device(RUNS, dtype=torch.bfloat16, steps=FEW, momentum_dtype=torch.int8)["params"]
    random = alone("int8, random", torch.bfloat16)["params"]
    assert not any(torch.equal(random[name], value) for name, value in nearest.items() if "norm" not in name)


@pytest.mark.parametrize("name", ["TP 2, runs", pytest.param("FSDP2 x TP 3x2, runs", marks=pytest.mark.slow)])
def test_other_meshes_are_a_unit_of_int8_away(name: str) -> None:
    """Partial sums of a cut row may change a last bit, and that a rounding of the next momentum, by one unit."""
    want = alone("int8", torch.float32)
    got, _ = on_mesh(name, dtype=torch.float32, steps=FEW, momentum_dtype=torch.int8)
    for key, value in want["exp_avg"].items():
        unit = value.abs().amax(-1, keepdim=True) / 127  # no smaller than any run's own
        assert ((got["exp_avg"][key] - value).abs() <= 1.01 * unit).all(), key
    assert max(error(got["exp_avg_sq"][key], value) for key, value in want["exp_avg_sq"].items()) < 1e-5
    assert max(error(got["params"][key], value) for key, value in want["params"].items()) < 1e-3


def test_a_whole_run_stays_close_to_float32_momentum() -> None:
    both = ({}, {"momentum_dtype": torch.int8})
    exact, rounded = (on_one_device(RUNS, dtype=torch.float32, steps=STEPS, **more)["params"] for more in both)
    assert max(error(rounded[key], value) for key, value in exact.items()) < 0.02


# Meshes that cut a run


def refused(rank: int, world: int, name: str, how: str) -> str:
    """What a rank is told."""
    mesh = MESHES[name]
    placed = Placed.decoder(mesh, torch.float32)
    optimizer = make("AdamMini", placed.params, mesh.sizes, momentum_dtype=torch.int8)
    if how == "step":
        placed.inject({key: torch.ones(shape) for key, shape in full_shapes(mesh.sizes).items()})
    try:
        getattr(optimizer, how)()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["init_state", "table", "step"])
def test_meshes_that_cut_a_run_are_refused_on_every_rank_alike(how: str) -> None:
    """FSDP over tensor parallelism: rows are cut by _StridedShard, and columns by Shard(1)."""
    mesh = MESHES["FSDP2 x TP 2x2, cut runs"]
    told = run(refused, mesh.world, mesh.name, how, timeout=30)
    assert all(one == told[0] for one in told)
    for words in (
        "AdamMini cannot plan 'layers.0.feed_forward.w2.weight'",
        f"one scale per run of {RUN} columns",
        "mesh axis 'tp' (of 2) cuts dim 1, of 384 columns, at 192",
        "momentum_dtype bfloat16",
    ):
        assert words in told[0]


@pytest.mark.parametrize("name", ["TP 2, cut runs", pytest.param("HSDP x TP 2x2x2, cut runs", marks=pytest.mark.slow)])
def test_other_meshes_too(name: str) -> None:
    told = run(refused, MESHES[name].world, name, "init_state", timeout=60)
    assert "mesh axis 'tp' (of 2) cuts dim 1" in told[0] and all(one == told[0] for one in told)


@pytest.mark.parametrize("name", ["FSDP2 3, cut runs", "FSDP2 x TP 2x2, runs"])
def test_meshes_that_do_not_are_not(name: str) -> None:
    """The same tensors under FSDP alone, and columns cut at 128; rows are cut by _StridedShard there."""
    told = run(refused, MESHES[name].world, name, "init_state", timeout=60)
    assert all(one == "" for one in told)


def columns(rank: int, world: int, size: int, placements: Any, shape: tuple[int, ...]) -> str:
    """What check_runs says of 2 x `size` under `placements`, each (kind, dim, split factor), of a mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    from titan_adam_mini.momentum import check_runs
    from titan_adam_mini.sharding import Shard as Held
    from titan_adam_mini.sharding import box_shape

    made = [
        Replicate() if dim is None else _StridedShard(dim, split_factor=factor) if factor > 1 else Shard(dim)
        for dim, factor in placements
    ]
    mesh = init_device_mesh("cpu", shape)
    here = Held.of((2, size), made, shape, mesh.get_coordinate() or ())
    data = torch.zeros(box_shape(here.box()))
    param = DTensor.from_local(data, mesh, made, run_check=False, shape=torch.Size((2, size)), stride=(size, 1))
    try:
        check_runs(param)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("size", "placements", "words"),
    [
        (2 * RUN, [(1, 1), (None, 1)], ""),
        (4 * RUN, [(1, 1), (1, 1)], ""),
        (4 * RUN, [(1, 2), (1, 1)], ""),
        (3 * RUN, [(1, 1), (None, 1)], "mesh axis 0 (of 2) cuts dim 1, of 384 columns, at 192"),
        (2 * RUN, [(1, 1), (1, 1)], "mesh axis 1 (of 2) cuts dim 1, of 256 columns, at 64"),
        (2 * RUN, [(1, 2), (1, 1)], "mesh axis 0 (of 2) cuts dim 1, of 256 columns, at 64"),
        (3 * RUN, [(1, 2), (1, 1)], "mesh axis 1 (of 2) cuts dim 1, of 384 columns, at 192"),
        (RUN, [(0, 1), (1, 1)], "mesh axis 1 (of 2) cuts dim 1, of 128 columns, at 64"),
    ],
)
def test_columns_cut_on_two_axes(size: int, placements: Any, words: str) -> None:
    told = run(columns, 4, size, placements, (2, 2), timeout=30)
    assert all(one == told[0] for one in told)
    assert (words in told[0]) if words else told[0] == ""


def disagreeing(rank: int, world: int) -> None:
    """One rank has int8 momentum, the other float32: no run is cut, and nobody would know."""
    mesh = MESHES["FSDP2 2, runs"]
    dtype = torch.int8 if rank else torch.float32
    make("AdamMini", Placed.decoder(mesh).params, mesh.sizes, momentum_dtype=dtype).init_state()


def test_ranks_that_disagree_about_the_type_are_told() -> None:
    with pytest.raises(RankError, match="plans differ between ranks"):
        run(disagreeing, 2, timeout=30)
    assert CUT_RUNS.hidden % (2 * RUN)
