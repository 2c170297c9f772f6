"""From a torchtitan configuration to the data that gives the memory of all N ranks: one rank of every pipeline stage is
built on the meta device, one after another. The other ranks of its stage differ in their coordinates only."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims

from titan_adam_mini.offline.build import built, spec_and_args
from titan_adam_mini.offline.rank_memory import NO_MESH, Kind, Mesh, Param, Run, Stage
from titan_adam_mini.offline.refusals import check_run
from titan_adam_mini.partition import clean_name
from titan_adam_mini.sharding import local
from titan_adam_mini.titan.builder import NAME, optimizer_of
from titan_adam_mini.titan.knobs import read_knobs


def run_of(config: Any, ngpu: int) -> Run:
    """A run of AdamMini with this configuration, whatever the configuration's optimizer.

    Args:
        config: torchtitan's job configuration, from `configured`.
        ngpu: number of ranks.

    Raises:
        ValueError: the run could not start.
    """
    spec, args = spec_and_args(config)
    check_run(config, spec, args, ngpu)
    ranks_per_stage = ngpu // config.parallelism.pipeline_parallel_degree
    stages, saved = [], dict[str, int]()
    meshes: dict[str, dict[str, int]] = {}
    for first in range(0, ngpu, ranks_per_stage):
        with built(config, ngpu, first) as model:
            dims = model.dims
            stages.append(_stage(range(first, first + ranks_per_stage), model.parts, config, dims))
            meshes = meshes or _meshes(dims)
            for part in model.parts:
                saved |= {clean_name(name): _bytes(value) for name, value in part.state_dict().items()}
    return Run(
        model=f"{config.model.name} {config.model.flavor}",
        ngpu=ngpu,
        meshes=meshes,
        stages=tuple(stages),
        model_checkpoint=sum(saved.values()),
        momentum=read_knobs(config.optimizer).momentum_dtype,
        fused=config.optimizer.implementation == "fused",
        offloaded=config.training.enable_cpu_offload,
        checkpoints=config.checkpoint.enable,
        batch=config.training.local_batch_size,
        seq_len=config.training.seq_len,
        notes=tuple(_notes(config, dims)),
    )


def _notes(config: Any, dims: ParallelDims) -> Iterator[str]:
    if config.model.converters:
        names = ", ".join(config.model.converters)
        yield f"model.converters ({names}) may need a GPU and are not applied: their effect is not counted."
    if dims.dp_replicate_enabled and not dims.fsdp_enabled and not dims.ep_enabled:
        yield "DDP's buckets, together as large as the gradients, are not counted."
    if config.optimizer.name != NAME:
        yield f"The configuration uses {config.optimizer.name}; this plan compares AdamMini with AdamW."


def _stage(ranks: range, parts: list[Any], config: Any, dims: ParallelDims) -> Stage:
    """One pipeline stage, from the model parts that this process has built as one of its ranks."""
    meshes: dict[Any, Mesh] = {}
    groups: dict[int, int] = {}
    params_of_parts = []
    for part in parts:
        optimizer = optimizer_of(part, config.optimizer, dims)
        trained = {name: tuple(param.shape) for name, param in part.named_parameters() if param.requires_grad}
        blocks = optimizer.partition.assign(trained)
        managed = _managed(part, groups)
        embeddings = {module.weight for module in part.modules() if isinstance(module, torch.nn.Embedding)}
        params = []
        for name, param in part.named_parameters():
            group, axis = managed.get(param, (None, None))
            own = blocks.get(name)
            mesh, placements = NO_MESH, ()
            if isinstance(param, DTensor):
                mesh = meshes.setdefault(param.device_mesh, _mesh(param.device_mesh))
                placements = tuple(param.placements)
            unsharded_gradient = param in embeddings and param not in managed
            layouts = own.layouts if own else ()
            kind = Kind(tuple(param.shape), param.dtype, placements, mesh, layouts, axis, unsharded_gradient)
            params.append(Param(clean_name(name), kind, group, own))
        params_of_parts.append(tuple(params))
    buffers = tuple(_bytes(local(buffer)) for part in parts for buffer in part.buffers())
    return Stage(ranks, tuple(params_of_parts), buffers)


def _managed(part: Any, groups: dict[int, int]) -> dict[Any, tuple[int, int | None]]:
    """Parameter -> (number of its FSDP group, axis of its mesh that FSDP2 shards it along); `groups` has their numbers.

    Raises ValueError for a weight in two groups, which torch 2.13 and later refuse in the first forward pass.
    """
    managed = {}
    owners: dict[int, Any] = {}
    for module in part.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 on; one group per module before
        for group in several if several is not None else [state._fsdp_param_group]:
            if group is not None:
                number = groups.setdefault(id(group), len(groups))
                for fsdp_param in group.fsdp_params:
                    origin = getattr(fsdp_param, "_orig_param_uid", id(fsdp_param))
                    if owners.setdefault(origin, group) is not group:
                        names = (name for name, param in part.named_parameters() if param is fsdp_param.sharded_param)
                        raise ValueError(
                            f"{clean_name(next(names))} is tied to a weight of another FSDP group, which torch "
                            f"{torch.__version__} refuses: choose a flavor with an untied output layer"
                        )
                    managed[fsdp_param.sharded_param] = (number, fsdp_param.mesh_info.shard_mesh_dim)
    return managed


def _mesh(mesh: Any) -> Mesh:
    """A device mesh as data, with the strides of its own ranks."""
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    strides = []
    for axis, size in enumerate(mesh.shape):
        along = mesh.mesh.movedim(axis, 0).reshape(size, -1)[:, 0].tolist()
        strides.append(along[1] - along[0] if size > 1 else 1)
    return Mesh(tuple(names), tuple(mesh.shape), tuple(strides))


def _meshes(dims: ParallelDims) -> dict[str, dict[str, int]]:
    """The meshes of torchtitan's ParallelDims: the dense parameters', and the experts' where they have their own."""
    fsdp = dims.dp_shard * dims.cp
    outer = {"pp": dims.pp, "dp_replicate": dims.dp_replicate}
    meshes = {"dense": {**outer, "fsdp": fsdp, "tp": dims.tp}}
    if dims.ep > 1:
        efsdp = fsdp * dims.tp // (dims.ep * dims.etp)
        meshes["experts"] = {**outer, "efsdp": efsdp, "ep": dims.ep, "etp": dims.etp}
    return meshes


def _bytes(tensor: Any) -> int:
    """Bytes of an unsharded tensor; 0 for anything else."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize if hasattr(tensor, "shape") else 0
