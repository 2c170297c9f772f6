"""The parameters of one rank of N, from a torchtitan configuration, on the meta device under a fake process group."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from titan_adam_mini.bench.rank_params import LocalParam, RankParams
from titan_adam_mini.offline.build import built, configured
from titan_adam_mini.partition import clean_name
from titan_adam_mini.titan.builder import optimizer_of


def read_rank_params(arguments: list[str], ngpu: int, rank: int, layers: int | None) -> RankParams:
    """The parameters of rank `rank` of `ngpu`, after torchtitan's own parallelisation.

    Needs a process of its own: see `tools/isolated_process.py`.

    Args:
        arguments: torchtitan's command line, with `--job.config_file X`.
        ngpu: number of ranks.
        rank: the rank.
        layers: transformer layers to keep; all if None.

    Raises:
        ValueError: the configuration cannot be built on this number of ranks.
    """
    config = configured(arguments, ngpu)
    with built(config, ngpu, rank, layers) as model:
        optimizers = [optimizer_of(part, config.optimizer, model.dims) for part in model.parts]
        named = {
            clean_name(name): param
            for part in model.parts
            for name, param in part.named_parameters()
            if param.requires_grad
        }
        meshes: list[Any] = []
        params = tuple(_local_param(name, param, meshes) for name, param in named.items())
    geometry, group = optimizers[0].partition.geometry, optimizers[0].param_groups[0]
    return RankParams(
        f"{config.model.name} {config.model.flavor}",
        model.layers,
        params,
        tuple((mesh.mesh.tolist(), mesh.mesh_dim_names) for mesh in meshes),
        optimizers[0].partition,
        {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
        {"dim": getattr(model.args, "dim", None), "n_heads": geometry.n_heads, "n_kv_heads": geometry.n_kv_heads},
    )


def _local_param(name: str, param: torch.Tensor, meshes: list[Any]) -> LocalParam:
    """One parameter as data; its mesh is added to `meshes` if it is new there."""
    shape, stride = tuple(param.shape), tuple(param.stride())
    if not isinstance(param, DTensor):
        return LocalParam(name, shape, stride, shape, param.dtype)
    if param.device_mesh not in meshes:
        meshes.append(param.device_mesh)
    local = tuple(param.to_local().shape)
    return LocalParam(name, shape, stride, local, param.dtype, meshes.index(param.device_mesh), tuple(param.placements))
