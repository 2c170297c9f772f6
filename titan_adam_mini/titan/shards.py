"""From a torchtitan configuration to what one rank of N holds: built on the meta device, under a fake process group."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from titan_adam_mini.bench.part import Held, Part
from titan_adam_mini.partition import clean_name
from titan_adam_mini.titan.builder import optimizer_of
from titan_adam_mini.titan.register import enable


def read_part(arguments: list[str], ngpu: int, rank: int, layers: int | None) -> Part:
    """What rank `rank` of `ngpu` holds, after torchtitan's own parallelisation. Takes the whole process: see `cli.py`.

    Args:
        arguments: torchtitan's command line, `--job.config_file X` among it.
        ngpu: number of ranks.
        rank: the one that is looked at.
        layers: transformer layers to keep; all if None.

    Raises:
        ValueError: the configuration cannot be built at this number of ranks, in words.
    """
    config = configured(arguments, ngpu)
    with a_rank(rank, ngpu):
        args, kept, parts, dims = built_or_told(config, ngpu, layers)
        optimizers = [optimizer_of(part, config.optimizer, dims) for part in parts]
        named = {
            clean_name(name): param for part in parts for name, param in part.named_parameters() if param.requires_grad
        }
        meshes: list[Any] = []
        held = tuple(_held(name, param, meshes) for name, param in named.items())
    geometry, group = optimizers[0].partition.geometry, optimizers[0].param_groups[0]
    return Part(
        f"{config.model.name} {config.model.flavor}",
        kept,
        held,
        tuple((mesh.mesh.tolist(), mesh.mesh_dim_names) for mesh in meshes),
        optimizers[0].partition,
        {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
        {"dim": getattr(args, "dim", None), "n_heads": geometry.n_heads, "n_kv_heads": geometry.n_kv_heads},
    )


def configured(arguments: list[str], ngpu: int) -> Any:
    """torchtitan's job configuration, set up so that a model can be built from it without an accelerator."""
    # No accelerator is needed to build on the meta device, and none is to lose memory to this process.
    os.environ.update(CUDA_VISIBLE_DEVICES="", NGPU=str(ngpu), WORLD_SIZE=str(ngpu), RANK="0", LOCAL_RANK="0")
    # Patterns of tensor parallelism that belong to another pipeline stage.
    warnings.filterwarnings("ignore", message="Parallelize plan key")
    config = ConfigManager().parse_args(arguments)
    if name := config.experimental.custom_import:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"experimental.custom_import = {name!r} cannot be imported: {error}") from None
    enable()
    return config


@contextmanager
def a_rank(rank: int, ngpu: int) -> Iterator[None]:
    """While it lasts this process is one rank of `ngpu`, whose collectives return at once and move nothing."""
    os.environ["RANK"] = str(rank)
    dist.init_process_group("fake", rank=rank, world_size=ngpu, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def built_or_told(config: Any, ngpu: int, layers: int | None = None) -> Any:
    """`_built`, with whatever torchtitan or torch refuse as a ValueError in one sentence."""
    # None of these changes a parameter; the first two want an accelerator, the last the first.
    config.compile.enable = config.parallelism.enable_async_tensor_parallel = False
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    try:
        return _built(config, ngpu, layers)
    except ValueError:
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"torchtitan cannot build this configuration on {ngpu} ranks: {type(error).__name__}: {told}"
        ) from None


def spec_and_args(config: Any) -> tuple[Any, Any]:
    """torchtitan's TrainSpec and the model arguments of the flavor. Raises ValueError for an unknown one."""
    spec = get_train_spec(config.model.name)
    if config.model.flavor not in spec.model_args:
        raise ValueError(
            f"{config.model.name} has no flavor {config.model.flavor!r}: it has {', '.join(sorted(spec.model_args))}"
        )
    return spec, spec.model_args[config.model.flavor]


def _built(config: Any, ngpu: int, layers: int | None) -> tuple[Any, tuple[int, int] | None, list[Any], ParallelDims]:
    """Model arguments, layers (kept, all), this rank's model parts, and torchtitan's ParallelDims."""
    spec, args = spec_and_args(config)
    degrees = config.parallelism
    dims = ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=degrees.context_parallel_degree,
        tp=degrees.tensor_parallel_degree,
        pp=degrees.pipeline_parallel_degree,
        ep=degrees.expert_parallel_degree,
        etp=degrees.expert_tensor_parallel_degree,
        world_size=ngpu,
    )
    args.update_from_config(config)
    total = getattr(args, "n_layers", None)
    if layers is not None:
        if total is None:
            raise ValueError(f"--layers cannot shorten {config.model.name}: its arguments have no n_layers")
        if not 1 <= layers <= total:
            raise ValueError(f"--layers {layers} is not possible: the model has {total} layers")
        args.n_layers = layers
    kept = None if total is None else (args.n_layers, total)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(args)
    if not dims.pp_enabled:
        return args, kept, [spec.parallelize_fn(model, dims, config)], dims
    if spec.pipelining_fn is None:
        raise ValueError(f"{config.model.name} cannot be cut into pipeline stages")
    loss = spec.build_loss_fn(config, parallel_dims=dims)
    _, parts, _, _ = spec.pipelining_fn(model, dims, config, torch.device("meta"), args, spec.parallelize_fn, loss)
    return args, kept, parts, dims


def _held(name: str, param: torch.Tensor, meshes: list[Any]) -> Held:
    """One parameter as data; its mesh is added to `meshes` if it is new there."""
    shape, stride = tuple(param.shape), tuple(param.stride())
    if not isinstance(param, DTensor):
        return Held(name, shape, stride, shape, param.dtype)
    if param.device_mesh not in meshes:
        meshes.append(param.device_mesh)
    local = tuple(param.to_local().shape)
    return Held(name, shape, stride, local, param.dtype, meshes.index(param.device_mesh), tuple(param.placements))
