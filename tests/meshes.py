"""The catalogue of meshes, ways to put the same tensors on them, and to get them back whole.

Every element's place is found by sending its own flat index through torch's parallelism first: whatever torch makes
of it is what this rank holds. So neither gradients nor results depend on code under test, nor on torch's own
gathering (`distribute_tensor` refuses uneven `_StridedShard`s, which FSDP2 over tensor parallelism makes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from decoder import Decoder, Experts, Layer, Sizes, shard_data, shard_experts, shard_tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from titan_adam_mini.layout import BlockLayout

DENSE = Sizes()
MOE = replace(DENSE, layers=1, experts=5)
MOE_EVEN = replace(MOE, dim=12, hidden=18)
"""FSDP2 cuts evenly along any dim but the first."""
EVEN = Sizes(vocab=32, dim=12, layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24)
"""Heads are still cut by FSDP2 over 3 and 4, but rows divide by 2 x 2: torch's checkpoints need that with TP."""
RUNS = Sizes(vocab=29, dim=128, layers=1, n_heads=6, n_kv_heads=3, head_dim=7, hidden=256)
"""Momentum is int8 but for `wo`, whose columns do not fill runs, and the norms; heads are cut, rows come out uneven."""
EVEN_RUNS = Sizes(vocab=32, dim=128, layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=256)
"""The same with rows that divide by 2 x 2."""
CUT_RUNS = replace(RUNS, hidden=384)
"""Tensor parallelism of 2 cuts the columns of `w2` at 192, inside a run."""
Part = tuple[Tensor, Tensor]
"""(flat indices, values): what one rank holds of one tensor."""


# The tensors: full values, blocks, decay


@cache
def full_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole decoder."""
    return {name: tuple(param.shape) for name, param in Decoder(sizes).named_parameters()}


def layouts(sizes: Sizes, second_moment: str = "blocks") -> dict[str, BlockLayout]:
    """The blocks of every parameter, by hand; of a factored one, its rows."""
    found = {}
    for name, shape in full_shapes(sizes).items():
        stack = [1] * (len(shape) - 2)
        if len(shape) == 1:
            found[name] = BlockLayout.of(shape, None)
        elif second_moment == "channels" and name.removesuffix(".weight").endswith(("wo", "w2")):
            found[name] = BlockLayout.of(shape, *stack, None, 1)
        else:
            heads = second_moment == "blocks" and name.endswith(("wq.weight", "wk.weight"))
            found[name] = BlockLayout.of(shape, *stack, sizes.head_dim if heads else 1, None)
    return found


def factors(sizes: Sizes) -> dict[str, tuple[BlockLayout, BlockLayout]]:
    """The columns and the whole of every matrix, or of every expert, by hand."""
    found = {}
    for name, shape in full_shapes(sizes).items():
        if len(shape) > 1:
            stack = [1] * (len(shape) - 2)
            found[name] = (BlockLayout.of(shape, *stack, None, 1), BlockLayout.of(shape, *stack, None, None))
    return found


def draw(shapes: Mapping[str, Sequence[int]], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Float64 normal values; a tensor's depend on its place in `shapes` and the seed only."""
    values = {}
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        values[name] = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
    return values


# The catalogue


@dataclass(frozen=True)
class Mesh:
    """One way to spread the decoder over ranks.

    Attributes:
        name: what the tables call it.
        shape: the device mesh.
        axes: its axes' names: pp, rep, dp, ep, tp.
        sizes: the decoder; nasty ones, so only good for gradients that are put there by hand.
        norms: with tp, "sequence" (norms are Replicate along tp) or "plain".
        partial: gradients of norms are Partial along tp, as in tensor parallelism alone.
        expert_dim: the dim along which FSDP2 cuts experts.
        offload: parameters, gradients and state in host memory.
        device: the type of the ranks' devices.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sizes: Sizes = DENSE
    norms: str = "sequence"
    partial: bool = False
    expert_dim: int = 0
    offload: bool = False
    device: str = "cpu"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(self.shape)

    def place(self, model: Decoder) -> None:
        """Cut the model to this rank's stage, then parallelise it in torchtitan's order: tp, ep, FSDP."""
        mesh = init_device_mesh(self.device, self.shape, mesh_dim_names=self.axes)
        if "pp" in self.axes:
            model.stage(first=mesh.get_local_rank("pp") == 0)
        if "tp" in self.axes:
            shard_tensors(model, mesh["tp"], self.norms)
        offload = CPUOffloadPolicy(pin_memory=False) if self.offload else None
        if "ep" in self.axes:
            shard_experts(model, mesh["ep"])
            if "dp" in self.axes:
                self._shard_moe(model, mesh)
        elif "rep" in self.axes:
            shard_data(model, mesh["rep", "dp"], offload)
        elif "dp" in self.axes:
            shard_data(model, mesh["dp"], offload, self.expert_dim)

    def _shard_moe(self, model: Decoder, mesh: DeviceMesh) -> None:
        """As torchtitan: experts over (dp, ep), everything else over all of these ranks as one axis."""
        everyone = mesh._flatten("dp_ep")
        for module in model.modules():
            if isinstance(module, Experts):
                fully_shard(module, mesh=mesh["dp"], shard_placement_fn=lambda param: Shard(self.expert_dim))
        for module in model.modules():
            if isinstance(module, Layer):
                fully_shard(module, mesh=everyone)
        fully_shard(model, mesh=everyone)


def _catalogue() -> dict[str, Mesh]:
    meshes = [
        Mesh("one rank", (1,), ("dp",)),
        *(Mesh(f"FSDP2 {n}", (n,), ("dp",)) for n in (2, 3, 4, 5, 7, 8)),
        Mesh("FSDP2 2, CPU offload", (2,), ("dp",), offload=True),
        *(Mesh(f"HSDP {a}x{b}", (a, b), ("rep", "dp")) for a, b in ((2, 2), (2, 3), (3, 2), (2, 1))),
        *(Mesh(f"TP {n}", (n,), ("tp",), partial=True) for n in (2, 3, 4)),
        Mesh("TP 2, plain norms", (2,), ("tp",), norms="plain"),
        *(Mesh(f"FSDP2 x TP {a}x{b}", (a, b), ("dp", "tp")) for a, b in ((2, 2), (3, 2), (2, 3), (4, 2))),
        Mesh("FSDP2 x TP 2x2, norms on dp", (2, 2), ("dp", "tp"), norms="plain"),
        Mesh("HSDP x TP 2x2x2", (2, 2, 2), ("rep", "dp", "tp")),
        Mesh("FSDP2 4, experts", (4,), ("dp",), sizes=MOE),
        Mesh("FSDP2 3, experts Shard(1)", (3,), ("dp",), sizes=MOE_EVEN, expert_dim=1),
        Mesh("EP 2", (2,), ("ep",), sizes=MOE),
        Mesh("FSDP2 x EP 2x2", (2, 2), ("dp", "ep"), sizes=MOE),
        Mesh("FSDP2 x EP 3x2", (3, 2), ("dp", "ep"), sizes=MOE),
        Mesh("FSDP2 x EP 2x2, experts Shard(1)", (2, 2), ("dp", "ep"), sizes=MOE_EVEN, expert_dim=1),
        Mesh("FSDP2 3, even", (3,), ("dp",), sizes=EVEN),
        Mesh("FSDP2 x TP 2x2, even", (2, 2), ("dp", "tp"), sizes=EVEN),
        Mesh("PP 2", (2,), ("pp",)),
        Mesh("PP x FSDP2 2x2", (2, 2), ("pp", "dp")),
        Mesh("PP x FSDP2 x TP 2x2x2", (2, 2, 2), ("pp", "dp", "tp")),
    ]
    return {mesh.name: mesh for mesh in meshes}


CATALOGUE = _catalogue()
WITH_RUNS = {
    f"{name}, {word}": replace(CATALOGUE[name], name=f"{name}, {word}", sizes=sizes)
    for names, word, sizes in (
        (("one rank", *(f"FSDP2 {n}" for n in (2, 3, 4, 7)), "HSDP 2x2", "HSDP 2x3"), "runs", RUNS),
        (("TP 2", "FSDP2 x TP 2x2", "FSDP2 x TP 3x2"), "runs", RUNS),
        (("FSDP2 2", "FSDP2 3", "FSDP2 x TP 2x2"), "even runs", EVEN_RUNS),
        (("FSDP2 3", "TP 2", "FSDP2 x TP 2x2", "HSDP x TP 2x2x2"), "cut runs", CUT_RUNS),
    )
    for name in names
}
"""Some of these meshes with decoders for int8 momentum."""
MESHES = CATALOGUE | WITH_RUNS


# Tensors in place


class Placed:
    """Named parameters on this rank, and the flat global index of every element of their local tensors."""

    def __init__(self, params: Mapping[str, Tensor], module: nn.Module | None = None) -> None:
        """`params` hold their own flat indices."""
        self.module = module
        self.params = dict(params)
        self.index = {name: local(param).detach().cpu().long().clone() for name, param in params.items()}

    @staticmethod
    def decoder(mesh: Mesh, dtype: torch.dtype = torch.float64) -> Placed:
        """The decoder on a mesh of the catalogue; its values are still indices."""
        model = Decoder(mesh.sizes).to(mesh.device, dtype)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.arange(param.numel()).view_as(param))
        mesh.place(model)
        placed = Placed(dict(model.named_parameters()), model)
        if torch.finfo(dtype).bits < 32:  # too few digits for an index: ask a twin with more
            placed.index = Placed.decoder(mesh).index
        return placed

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> Placed:
        """Give the parameters these full values."""
        for name, param in self.params.items():
            local(param).copy_(values[name].flatten()[self.index[name]])
        return self

    def inject(
        self, grads: Mapping[str, Tensor | None], partial: Callable[[str, Tensor], Sequence[int]] | None = None
    ) -> None:
        """Give the parameters these full gradients; along the mesh axes that `partial(name, param)` names, in parts."""
        for name, param in self.params.items():
            full, axes = grads[name], () if partial is None else partial(name, param)
            param.grad = None if full is None else self._gradient(name, full, axes)

    def _gradient(self, name: str, full: Tensor, partial: Sequence[int]) -> Tensor:
        param = self.params[name]
        data = full.flatten()[self.index[name]].to(param.device, param.dtype)
        if not isinstance(param, DTensor):
            return data
        mesh, placements = param.device_mesh, list(param.placements)
        for axis in partial:
            size, coordinate = mesh.size(axis), mesh.get_local_rank(axis)
            data = data * (2 * (coordinate + 1) / (size * (size + 1)))
            placements[axis] = Partial()
        return DTensor.from_local(data, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())

    def parts(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Part]:
        """What this rank holds of the parameters, or of other tensors placed like them."""
        values = self.params if values is None else values
        return {name: (self.index[name], local(value).detach().cpu().clone()) for name, value in values.items()}


def norms_along_tp(mesh: Mesh) -> Callable[[str, Tensor], Sequence[int]]:
    """For `Placed.inject`: the axes along which a decoder's gradients are Partial on this mesh."""

    def axes(name: str, param: Tensor) -> Sequence[int]:
        return (mesh.axes.index("tp"),) if mesh.partial and "norm" in name else ()

    return axes


def local(tensor: Tensor) -> Tensor:
    """This rank's data."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(shapes: Mapping[str, Sequence[int]], ranks: Sequence[Mapping[str, Part]]) -> dict[str, Tensor]:
    """Full tensors from what all ranks hold. Asserts that nothing is missing and that replicas are bit-equal."""
    tensors = {}
    for name, shape in shapes.items():
        held = [parts[name] for parts in ranks if name in parts]
        assert held, f"no rank has {name}"
        full = torch.zeros(prod(shape), dtype=held[0][1].dtype)
        seen = torch.zeros(prod(shape), dtype=torch.bool)
        for index, value in held:
            index, value = index.flatten(), value.flatten()
            again = seen[index]
            assert torch.equal(full[index][again], value[again]), f"replicas of {name} differ"
            full[index], seen[index] = value, True
        assert seen.all(), f"nobody has {int((~seen).sum())} elements of {name}"
        tensors[name] = full.view(tuple(shape))
    return tensors
