"""The parameters of one rank of a run, as data that can be sent between processes, and as tensors.

torchtitan builds the model in a child process (`bench/shards.py`); here its parameters are created without the model:
plain local tensors, and the same tensors as DTensors of the right global shape, mesh and placements.
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
class LocalParam:
    """One parameter on one rank.

    Attributes:
        name: its name, without wrappers.
        shape, stride: of the global tensor.
        local: shape of this rank's shard.
        dtype: of the parameter.
        mesh: index into `RankParams.meshes`; None for a plain tensor.
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
        """Local elements."""
        return prod(self.local)


@dataclass(frozen=True)
class RankParams:
    """All trainable parameters of one rank, and what else the optimizers need.

    Attributes:
        model: name and flavor.
        layers: (transformer layers kept, layers of the model); None where the model does not count them.
        params: the parameters.
        meshes: per mesh the ranks as nested lists, and the names of its axes.
        partition: AdamMini's blocks.
        hyper: `lr`, `betas`, `eps` and `weight_decay` of the configuration.
        heads: `dim`, `n_heads` and `n_kv_heads` of the model, arguments of the authors' optimizer.
    """

    model: str
    layers: tuple[int, int] | None
    params: tuple[LocalParam, ...]
    meshes: tuple[tuple[list[Any], tuple[str, ...] | None], ...]
    partition: Partition
    hyper: dict[str, Any]
    heads: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of all parameters on this rank."""
        return sum(param.numel for param in self.params)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters on this rank."""
        return sum(param.numel * param.dtype.itemsize for param in self.params)

    @property
    def sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return any(param.mesh is not None for param in self.params)


@dataclass
class Tensors:
    """One rank's parameters with gradients, in two forms that share memory.

    Attributes:
        local: plain tensors, without empty ones, which a step does not touch.
        sharded: every parameter as in training: a DTensor if it is one there.
    """

    local: Named
    sharded: Named


@contextmanager
def allocated(rank_params: RankParams, ngpu: int, rank: int, device: torch.device) -> Iterator[Tensors]:
    """The rank's parameters and gradients, random, on `device`.

    Within the context there is a process group of `ngpu` ranks whose collectives return at once and move nothing.
    """
    if rank_params.sharded:
        from ..private import FakeStore

        dist.init_process_group("fake", rank=rank, world_size=ngpu, store=FakeStore())
    try:
        yield _tensors(rank_params, device)
    finally:
        if rank_params.sharded:
            dist.destroy_process_group()


def _tensors(rank_params: RankParams, device: torch.device) -> Tensors:
    random = torch.Generator(device).manual_seed(0)
    meshes = [DeviceMesh(device.type, ranks, mesh_dim_names=names) for ranks, names in rank_params.meshes]
    tensors = Tensors([], [])
    for param in rank_params.params:
        data, grad = (
            torch.empty(param.local, dtype=param.dtype, device=device).normal_(std=std, generator=random)
            for std in (0.02, 1e-3)
        )
        plain = _parameter(data, grad)
        if param.numel:
            tensors.local.append((param.name, plain))
        if param.mesh is not None:
            mesh, global_size = meshes[param.mesh], {"shape": torch.Size(param.shape), "stride": param.stride}
            data, grad = (
                DTensor.from_local(local, mesh, param.placements, run_check=False, **global_size)
                for local in (data, grad)
            )
        tensors.sharded.append((param.name, _parameter(data, grad) if param.mesh is not None else plain))
    return tensors


def _parameter(data: Tensor, grad: Tensor) -> Tensor:
    param = torch.nn.Parameter(data)
    param.grad = grad
    return param
