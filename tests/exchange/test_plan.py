"""The plan as a pure function: played for 1 to 1024 ranks in a loop, without a process group."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_adam_mini.kernels import vectorized
from titan_adam_mini.layout import BlockLayout, Tiles
from titan_adam_mini.plan import BlockPlan, BufferPlan, grids_of, ordered_groups, plan_buffers
from titan_adam_mini.sharding import Axis, box_shape
from titan_adam_mini.sharding import Shard as Part

# Llama3-8B's rows, with few columns: queries and keys in heads of 128 rows, everything else by row or whole.
LLAMA = {
    "tok_embeddings": BlockLayout.of((3001, 3), 1, None),
    "wq": BlockLayout.of((4096, 3), 128, None),
    "wk": BlockLayout.of((1024, 5), 128, None),
    "wv": BlockLayout.of((1024, 3), 1, None),
    "wo": BlockLayout.of((4096, 2), 1, None),
    "norm": BlockLayout.of((4096,), None),
    "fused": BlockLayout.of((640, 3), [(4, 128), (128, 1)], None),
    "bias": BlockLayout.of((100,), 1),
}


def axes_at(mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> tuple[Axis, ...]:
    """The axes, of more than one rank, of a mesh of ranks in row-major order."""
    numbers = torch.arange(prod(mesh)).view(mesh)
    axes = []
    for axis, size in enumerate(mesh):
        if size > 1:
            line = numbers[tuple(slice(None) if a == axis else c for a, c in enumerate(coordinate))]
            axes.append(Axis(axis, tuple(line.tolist())))
    return tuple(axes)


class World:
    """All ranks of a mesh at once: their plans, and a step's sums as the exchange moves them."""

    def __init__(self, mesh: tuple[int, ...], placements: dict[str, list], layouts: dict[str, BlockLayout]) -> None:
        self.coordinates = list(itertools.product(*map(range, mesh)))
        self.layouts = layouts
        self.plans: list[list[BlockPlan]] = []
        self.axes = [axes_at(mesh, coordinate) for coordinate in self.coordinates]
        for coordinate in self.coordinates:
            places = {name: placements.get(name, placements["*"]) for name in layouts}
            shards = {name: Part.of(layouts[name].shape, places[name], mesh, coordinate) for name in layouts}
            self.plans.append([BlockPlan.of(layouts[name], shards[name]) for name in layouts])
        self.buffers: list[tuple[BufferPlan, ...]] = [
            plan_buffers(grids_of([[plan] for plan in plans]), [axes] * len(plans))
            for plans, axes in zip(self.plans, self.axes, strict=True)
        ]

    def sums(self, rank: int, index: int, grad: Tensor) -> Tensor:
        """The sums of one parameter that a rank starts with."""
        plan = self.plans[rank][index]
        sums = torch.zeros(plan.sums_shape, dtype=grad.dtype)
        for box in plan.own:
            part = grad[tuple(slice(*interval) for interval in box)]
            if part.numel():
                sums[plan.place(box)] += vectorized.square_sums(part, plan.tiles_in(box), plan.keep, grad.dtype)
        return sums

    def means(self, grads: list[Tensor]) -> list[list[Tensor]]:
        """Per rank and parameter, the means of squares of its reach, after the exchange."""
        ranks = range(len(self.coordinates))
        state = [[self.sums(rank, index, grad) for index, grad in enumerate(grads)] for rank in ranks]
        order = ordered_groups(self.axes)
        for group in order:
            for rank in group:
                plan = next((one for one in self.buffers[rank] if one.group == group), None)
                assert plan == next((one for one in self.buffers[group[0]] if one.group == group), None)
            if plan is None:
                continue
            for slot in plan.slots:
                if slot.sums is not None:
                    total = torch.zeros_like(state[group[0]][slot.grid])
                    for rank in group:
                        total = total + state[rank][slot.grid]
                    for rank in group:
                        state[rank][slot.grid] = total.clone()
        for rank in ranks:
            for index, plan in enumerate(self.plans[rank]):
                sums = state[rank][index]
                if plan.axes and sums.numel():
                    state[rank][index] = vectorized.fold(sums, plan.reach_tiles, plan.keep)
        return state


def unsharded(layout: BlockLayout, grad: Tensor) -> Tensor:
    return vectorized.square_sums(grad, layout.dims, -1, grad.dtype)


def check(world: World, dtype: torch.dtype, exact: bool) -> None:
    """Every rank's sums are those of one device over its reach, and the owned boxes tile every tensor once."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(layout.shape, generator=generator, dtype=dtype) for layout in world.layouts.values()]
    want = [unsharded(layout, grad) for layout, grad in zip(world.layouts.values(), grads, strict=True)]
    got = world.means(grads)
    for index, (name, layout) in enumerate(world.layouts.items()):
        covered = torch.zeros(layout.shape, dtype=torch.int64)
        for rank, plans in enumerate(world.plans):
            plan = plans[index]
            for box in plan.own:
                covered[tuple(slice(*interval) for interval in box)] += 1
            blocks = tuple(
                slice(*tiles.span(*interval)) for tiles, interval in zip(layout.dims, plan.reach, strict=True)
            )
            expected = want[index][blocks]
            assert got[rank][index].shape == expected.shape == plan.grid_shape
            if exact:
                assert torch.equal(got[rank][index], expected), (name, rank)
            else:
                torch.testing.assert_close(got[rank][index], expected, rtol=1e-13, atol=0)
        assert covered.min() == covered.max() >= 1, name


@pytest.mark.parametrize("ranks", [1, 2, 7, 60, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 1000, 1024))])
def test_fsdp_of_any_size_adds_in_the_order_of_one_device(ranks: int) -> None:
    """Heads cut in up to 128 pieces, norms to 4 elements a rank, empty shards: the float32 bits stay."""
    check(World((ranks,), {"*": [Shard(0)]}, LLAMA), torch.float32, exact=True)


@pytest.mark.parametrize("mesh", [(3, 16), pytest.param((2, 100), marks=pytest.mark.slow)])
def test_hsdp_adds_in_the_order_of_one_device(mesh: tuple[int, int]) -> None:
    check(World(mesh, {"*": [Replicate(), Shard(0)]}, LLAMA), torch.float32, exact=True)


@pytest.mark.parametrize(
    "mesh", [(3, 2), (5, 3), *(pytest.param(m, marks=pytest.mark.slow) for m in ((16, 8), (128, 8)))]
)
def test_fsdp_times_tp(mesh: tuple[int, int]) -> None:
    strided = [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    placements = {"*": strided, "wo": [Shard(0), Shard(1)], "norm": [Shard(0), Replicate()], "bias": [Shard(0)] * 2}
    check(World(mesh, placements, LLAMA), torch.float64, exact=False)


def test_three_axes_in_every_order() -> None:
    mesh = (2, 3, 2)
    for placement in ([Shard(0), Shard(0), Shard(1)], [_StridedShard(0, split_factor=2), Shard(1), Shard(0)]):
        one_dim = [place if place.dim == 0 else Replicate() for place in placement]
        check(World(mesh, {"*": placement, "norm": one_dim, "bias": one_dim}, LLAMA), torch.float64, exact=False)


def test_strided_shards_are_cut_after_the_axes_their_factor_counts() -> None:
    """24 rows, first by axis 2 (Shard), then by axes 0 and 1: which of them first, axis 0's factor says."""
    mesh = (2, 3, 2)
    for factor, stride in ((2, (6, 2, 12)), (6, (2, 4, 12))):
        placements = [_StridedShard(0, split_factor=factor), _StridedShard(0, split_factor=2), Shard(0)]
        for coordinate in itertools.product(*map(range, mesh)):
            box = Part.of((24,), placements, mesh, coordinate).box()
            start = sum(step * place for step, place in zip(stride, coordinate, strict=True))
            assert box == ((start, start + 2),)


def test_a_split_factor_that_no_order_explains_is_refused() -> None:
    with pytest.raises(ValueError, match="matches no order"):
        Part.of((24,), [_StridedShard(0, split_factor=4), Shard(0)], (2, 2), (0, 0))


@pytest.mark.parametrize(("ranks", "megabytes"), [(8, 1.06), (64, 1.72)])
def test_llama3_8b_bytes_per_step(ranks: int, megabytes: float) -> None:
    """What the whole model exchanges per step, as computed by hand in the design."""
    layouts = {"output": BlockLayout.of((128256, 4096), 1, None), "norm": BlockLayout.of((4096,), None)}
    for layer in range(32):
        layouts |= {
            f"{layer}.wq": BlockLayout.of((4096, 4096), 128, None),
            f"{layer}.wk": BlockLayout.of((1024, 4096), 128, None),
            f"{layer}.wo": BlockLayout.of((4096, 4096), 1, None),
            f"{layer}.norm": BlockLayout.of((4096,), None),
            f"{layer}.ffn_norm": BlockLayout.of((4096,), None),
        }
    shards = [Part.of(layout.shape, [Shard(0)], (ranks,), (3,)) for layout in layouts.values()]
    plans = [BlockPlan.of(layout, shard) for layout, shard in zip(layouts.values(), shards, strict=True)]
    (buffer,) = plan_buffers(grids_of([[plan] for plan in plans]), [axes_at((ranks,), (3,))] * len(plans))
    heads = 32 * (4096 + 1024) if ranks == 64 else 0
    assert buffer.numel == 65 * 4096 + heads + len(layouts)
    assert abs(buffer.numel * 4 / 1e6 - megabytes) < 0.006


def test_the_order_of_groups_is_mesh_order_on_every_rank() -> None:
    for coordinate in itertools.product(range(2), range(2), range(2)):
        axes = axes_at((2, 2, 2), coordinate)
        assert ordered_groups([axes, axes[1:], axes[:2]]) == [axis.ranks for axis in axes]
    with pytest.raises(ValueError, match="same order of axes"):
        ordered_groups([axes, (Axis(0, axes[1].ranks), Axis(1, axes[0].ranks))])


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 5), (2, 1, 3)])
def test_flat_slices_are_boxes_in_memory_order(shape: tuple[int, ...]) -> None:
    """Elements [a, b) of the flattened tensor, as FSDP1 and ZeRO cut it, are the boxes one after the other."""
    flat = torch.arange(prod(shape))
    for start, stop in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        shard = Part(shape, flat=(start, stop, 0))
        views = shard.views(flat[start:stop])
        assert [tuple(view.shape) for view in views] == [box_shape(box) for box in shard.boxes()]
        for view, box in zip(views, shard.boxes(), strict=True):
            assert torch.equal(view, flat.view(shape)[tuple(slice(*interval) for interval in box)])
        assert sum(view.numel() for view in views) == stop - start


def test_flat_slices_complete_their_blocks() -> None:
    """The plan of flat slices: the sums of all ranks over the whole reach are those of one device."""
    layout = BlockLayout.of((10, 4), 5, None)
    grad = torch.randn(10, 4, dtype=torch.float64)
    total = torch.zeros(2, 1, dtype=torch.float64)
    for start, stop in [(0, 3), (3, 18), (18, 18), (18, 40)]:
        plan = BlockPlan.of(layout, Part((10, 4), flat=(start, stop, 0)))
        assert plan.axes == (0,) and plan.sums_shape == (2, 1)
        views = plan.shard.views(grad.flatten()[start:stop])
        for box, part in zip(plan.own, views, strict=True):
            total[plan.place(box)] += vectorized.square_sums(part, plan.tiles_in(box), plan.keep, grad.dtype)
    torch.testing.assert_close(total, unsharded(layout, grad), rtol=1e-14, atol=0)


def test_tiles_that_torch_would_chunk_otherwise_are_not_aligned() -> None:
    """No block is cut, but torch's chunks of the grid are not the tiles that the ranks own: the grid is whole."""
    layout = BlockLayout((Tiles.of([(1, 4), (4, 1)]), Tiles.whole(2)))
    plan = BlockPlan.of(layout, Part.of((8, 2), [Shard(0)], (2,), (0,)))
    assert plan.axes == (0,) and plan.grid_shape == (5, 1)
    even = BlockLayout.of((8, 2), 4, None)
    assert BlockPlan.of(even, Part.of((8, 2), [Shard(0)], (2,), (0,))).axes == ()
