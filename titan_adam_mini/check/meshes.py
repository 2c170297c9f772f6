"""Meshes, and functions that place the same tensors on them and gather them.

The position of every element is found by parallelising a model whose values are flat indices. So neither gradients nor
results depend on code under test, nor on torch's own gathering (`distribute_tensor` refuses uneven `_StridedShard`s, as
made by FSDP2 with tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from ..layout import BlockLayout
from .decoder import Decoder, Experts, Layer, Sizes, shard_data, shard_experts, shard_tensors

DENSE = Sizes()
"""Sizes that no number of ranks divides."""
Part = tuple[Tensor, Tensor]
"""(flat indices, values) of one rank's part of a tensor."""


# The tensors: full values, blocks, decay


@cache
def full_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the full decoder."""
    return {name: tuple(param.shape) for name, param in Decoder(sizes).named_parameters()}


def layouts(sizes: Sizes, second_moment: str = "blocks") -> dict[str, BlockLayout]:
    """The expected blocks of every parameter; of a factored one, its rows."""
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
    """The expected factor layouts (columns, full matrix) of every matrix, or of every expert."""
    found = {}
    for name, shape in full_shapes(sizes).items():
        if len(shape) > 1:
            stack = [1] * (len(shape) - 2)
            found[name] = (BlockLayout.of(shape, *stack, None, 1), BlockLayout.of(shape, *stack, None, None))
    return found


def draw(shapes: Mapping[str, Sequence[int]], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Float64 normal values; a tensor's values depend only on its position in `shapes` and the seed."""
    values = {}
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        values[name] = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
    return values


# A mesh


@dataclass(frozen=True)
class Mesh:
    """One way to distribute the decoder over ranks.

    Attributes:
        name: its name in tables.
        shape: the device mesh.
        axes: its axes' names: pp, rep, dp, ep, tp.
        sizes: of the decoder; often uneven, so only for given gradients.
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
        """As in torchtitan: experts over (dp, ep), everything else over all of these ranks as one axis."""
        everyone = mesh._flatten("dp_ep")
        for module in model.modules():
            if isinstance(module, Experts):
                fully_shard(module, mesh=mesh["dp"], shard_placement_fn=lambda param: Shard(self.expert_dim))
        for module in model.modules():
            if isinstance(module, Layer):
                fully_shard(module, mesh=everyone)
        fully_shard(model, mesh=everyone)


# Tensors in place


class Placed:
    """Named parameters on this rank, and the flat global index of every element of their local tensors."""

    def __init__(self, params: Mapping[str, Tensor], module: nn.Module | None = None) -> None:
        """The values of `params` must be their own flat indices."""
        self.module = module
        self.params = dict(params)
        self.index = {name: local(param).detach().cpu().long().clone() for name, param in params.items()}

    @staticmethod
    def decoder(mesh: Mesh, dtype: torch.dtype = torch.float64) -> Placed:
        """The decoder on a mesh; its values are indices."""
        model = Decoder(mesh.sizes).to(mesh.device, dtype)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.arange(param.numel()).view_as(param))
        mesh.place(model)
        placed = Placed(dict(model.named_parameters()), model)
        if torch.finfo(dtype).bits < 32:  # not enough bits for an index: use a float64 copy
            placed.index = Placed.decoder(mesh).index
        return placed

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> Placed:
        """Set the parameters from these full values."""
        for name, param in self.params.items():
            local(param).copy_(values[name].flatten()[self.index[name]])
        return self

    def inject(
        self, grads: Mapping[str, Tensor | None], partial: Callable[[str, Tensor], Sequence[int]] | None = None
    ) -> None:
        """Set gradients from these full ones; Partial along the mesh axes returned by `partial(name, param)`."""
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
        """This rank's part of the parameters, or of other tensors placed like them."""
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
