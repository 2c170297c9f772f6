"""The pure part, on random meshes: every element is held once per copy, coordinates are torch's, padding is FSDP2's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_adam_mini.checkpoint.check import mixes_up
from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.offline.rank_memory import (
    ROUNDING,
    Bytes,
    Kind,
    Mesh,
    Optimizer,
    Param,
    Stage,
    counts,
    padded_shape,
)
from titan_adam_mini.partition import Blocks
from titan_adam_mini.sharding import Shard as Held
from titan_adam_mini.sharding import box_shape


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """A matrix with row blocks, or blocks of several rows, on pp x replicate x fsdp x tp as torchtitan places it."""
    replicate, fsdp, tp = (draw(st.integers(1, 4)) for _ in range(3))
    mesh = Mesh(("dp_replicate", "fsdp", "tp"), (replicate, fsdp, tp), (fsdp * tp, tp, 1))
    shape = (draw(st.integers(1, 40)), draw(st.sampled_from([3, 8, 128, 256])))
    column = draw(st.sampled_from(["rows", "columns", "none"]))
    placements: tuple[Placement, ...] = {
        "rows": (Replicate(), _StridedShard(0, split_factor=tp) if tp > 1 else Shard(0), Shard(0)),
        "columns": (Replicate(), Shard(0), Shard(1)),
        "none": (Replicate(), Shard(0), Replicate()),
    }[column]
    rows = draw(st.sampled_from([size for size in range(1, shape[0] + 1) if shape[0] % size == 0]))
    return Kind(shape, torch.float32, placements, mesh, (BlockLayout.of(shape, rows, None),), fsdp=1)


def copies(kind: Kind) -> int:
    return prod(size for axis, size in enumerate(kind.mesh.sizes) if axis not in kind.sharded_axes)


@given(kinds())
def test_all_ranks_hold_every_element(kind: Kind) -> None:
    ranks = range(prod(kind.mesh.sizes))
    assert sum(counts(kind, kind.shard_coordinate(rank)).numel for rank in ranks) == copies(kind) * prod(kind.shape)


@given(kinds())
def test_padding_is_the_first_ranks_size(kind: Kind) -> None:
    """Along the FSDP axis all shards are as long as the first one's, which is the longest."""
    for place in product(*map(range, kind.mesh.sizes)):
        first = (place[0], 0, place[2])
        here, there = kind.shard(place), kind.shard(first)
        assert padded_shape(here, 1) == padded_shape(there, 1) == box_shape(there.box())
        assert padded_shape(here, None) == box_shape(here.box())


@given(kinds())
def test_second_moments_cover_the_grid(kind: Kind) -> None:
    """At least every block once per copy; exactly that where the grid is sharded as the parameter is."""
    (layout,) = kind.layouts
    ranks = range(prod(kind.mesh.sizes))
    held = sum(sum(counts(kind, kind.shard_coordinate(rank)).grids) for rank in ranks)
    assert held >= copies(kind) * layout.num_blocks
    if layout.dims[0].is_unit and not any(cut.dim == 1 for cut in kind.shard((0, 0, 0)).cuts):
        assert held == copies(kind) * layout.num_blocks


@given(kinds(), st.integers(0, 3))
def test_state_of_one_rank_is_the_sum_of_its_tensors(kind: Kind, seed: int) -> None:
    rank = seed % prod(kind.mesh.sizes)
    blocks = Blocks("w", kind.shape, "neuron", *kind.layouts, True, "*")
    stage = Stage(range(prod(kind.mesh.sizes)), (tuple(Param(name, kind, 0, blocks) for name in "abc"),))
    optimizers = {"adamw": Optimizer("", mini=False), "bf16": Optimizer("", True, torch.bfloat16)}
    held, seen = stage.memory_of(rank, optimizers), counts(kind, kind.shard_coordinate(rank))
    assert held.parameters.bytes == 3 * 4 * seen.numel
    assert held.state["adamw"].bytes == 3 * (8 * seen.numel + 4)
    assert held.state["bf16"].bytes == 3 * (2 * seen.numel + 4 * sum(seen.grids) + 4)
    padded = 3 * 4 * seen.padded  # one buffer for the three gradients, a tensor for each parameter
    assert held.gradients == Bytes(3 * 4 * seen.numel, padded - 3 * 4 * seen.numel, -padded % ROUNDING)
    assert held.parameters.rounding == 3 * (-4 * seen.padded % ROUNDING)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_torch_mixes_up_no_rows_where_tensor_parallelism_divides_them(rows: int, fsdp: int, tp: int) -> None:
    """What `checks._mixed_up` relies on: FSDP may then cut as unevenly as it likes."""
    placements = (_StridedShard(0, split_factor=tp) if tp > 1 else Shard(0), Shard(0))
    for place in product(range(fsdp), range(tp)):
        held = Held.of((rows * tp, 3), placements, (fsdp, tp), place)
        assert not mixes_up(held, placements, (fsdp, tp), place)


def coordinates(rank: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Where torch says that a rank of 8 stands, and with whom, on meshes that torchtitan unflattens the world into."""
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        whole = init_device_mesh("cpu", (8,), mesh_dim_names=("world",))
        for names, sizes in (
            (("pp", "replicate", "fsdp", "tp"), (2, 1, 2, 2)),
            (("pp", "replicate", "efsdp", "ep"), (1, 2, 2, 2)),
        ):
            mesh = whole._unflatten(0, sizes, names)[names[1:]]
            along = [dist.get_process_group_ranks(mesh.get_group(axis)) for axis in range(mesh.ndim)]
            yield list(mesh.get_coordinate() or ()), along
    finally:
        dist.destroy_process_group()


def test_coordinates_are_those_of_torch() -> None:
    meshes = [Mesh(("replicate", "fsdp", "tp"), (1, 2, 2), (4, 2, 1))]
    meshes += [Mesh(("replicate", "efsdp", "ep"), (2, 2, 2), (4, 2, 1))]
    for rank in range(8):
        for mesh, (coordinate, along) in zip(meshes, coordinates(rank), strict=True):
            assert list(mesh.coordinate(rank)) == coordinate
            for axis in mesh.axes(rank):
                assert list(axis.ranks) == along[axis.index]
            assert len(mesh.axes(rank)) == sum(size > 1 for size in mesh.sizes)
