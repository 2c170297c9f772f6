"""What one rank of a run holds, as data that travels between processes, and the tensors made from it.

torchtitan builds the model in a child process (`bench/shards.py`); here its parameters are made again without the
model: plain local tensors, and the same tensors as DTensors of the right global shape, mesh and placements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from ..partition import Partition

Named = list[tuple[str, Tensor]]
"""Parameters with their names, as optimizers take them."""


@dataclass(frozen=True)
class Held:
    """One parameter as one rank holds it.

    Attributes:
        name: its name, without wrappers.
        shape, stride: of the whole tensor.
        local: shape of this rank's part.
        dtype: of the parameter.
        mesh: index into `Part.meshes`; None for a plain tensor.
        placements: DTensor placements, one per mesh axis.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    local: tuple[int, ...]
    dtype: torch.dtype
    mesh: int | None = None
    placements: tuple[Placement, ...] = ()

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return prod(self.local)


@dataclass(frozen=True)
class Part:
    """All trainable parameters of one rank, and what optimizers need to know besides.

    Attributes:
        model: name and flavor.
        layers: (transformer layers kept, layers of the model); None where the model does not count them.
        held: the parameters.
        meshes: per mesh the ranks as nested lists, and the names of its axes.
        partition: AdamMini's blocks.
        hyper: `lr`, `betas`, `eps` and `weight_decay` of the configuration.
        heads: `dim`, `n_heads` and `n_kv_heads` of the model, as the authors' optimizer asks for them.
    """

    model: str
    layers: tuple[int, int] | None
    held: tuple[Held, ...]
    meshes: tuple[tuple[list[Any], tuple[str, ...] | None], ...]
    partition: Partition
    hyper: dict[str, Any]
    heads: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of all parameters on this rank."""
        return sum(one.numel for one in self.held)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters on this rank."""
        return sum(one.numel * one.dtype.itemsize for one in self.held)

    @property
    def sharded(self) -> bool:
        """Is any parameter a DTensor?"""
        return any(one.mesh is not None for one in self.held)


@dataclass
class Tensors:
    """One rank's parameters with gradients, twice over the same memory.

    Attributes:
        local: plain tensors, those without elements left out: a step has nothing to do there.
        sharded: every parameter as the training has it, a DTensor where it is one.
    """

    local: Named
    sharded: Named


@contextmanager
def allocated(part: Part, ngpu: int, rank: int, device: torch.device) -> Iterator[Tensors]:
    """The rank's parameters and gradients, random, on `device`.

    While the context lasts a process group of `ngpu` ranks exists whose collectives return at once and move nothing.
    """
    if part.sharded:
        from ..private import FakeStore

        dist.init_process_group("fake", rank=rank, world_size=ngpu, store=FakeStore())
    try:
        yield _tensors(part, device)
    finally:
        if part.sharded:
            dist.destroy_process_group()


def _tensors(part: Part, device: torch.device) -> Tensors:
    random = torch.Generator(device).manual_seed(0)
    meshes = [DeviceMesh(device.type, ranks, mesh_dim_names=names) for ranks, names in part.meshes]
    tensors = Tensors([], [])
    for one in part.held:
        data, grad = (
            torch.empty(one.local, dtype=one.dtype, device=device).normal_(std=std, generator=random)
            for std in (0.02, 1e-3)
        )
        plain = _parameter(data, grad)
        if one.numel:
            tensors.local.append((one.name, plain))
        if one.mesh is not None:
            mesh, whole = meshes[one.mesh], {"shape": torch.Size(one.shape), "stride": one.stride}
            data, grad = (
                DTensor.from_local(local, mesh, one.placements, run_check=False, **whole) for local in (data, grad)
            )
        tensors.sharded.append((one.name, _parameter(data, grad) if one.mesh is not None else plain))
    return tensors


def _parameter(data: Tensor, grad: Tensor) -> Tensor:
    param = torch.nn.Parameter(data)
    param.grad = grad
    return param
