"""From a torchtitan configuration to the parallelised model of one rank of N: on the meta device, without a network."""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from titan_adam_mini.private import FakeStore
from titan_adam_mini.titan.register import enable


@dataclass(frozen=True)
class Built:
    """A model as one rank has it after torchtitan's own parallelisation, parameters on the meta device.

    Attributes:
        config: torchtitan's job configuration.
        args: the model's arguments.
        layers: (transformer layers kept, layers of the model); None where the model does not count them.
        dims: torchtitan's ParallelDims.
        parts: the model parts of this rank: one, or as many as the pipeline schedule assigns to it.
        schedule: the pipeline schedule; None without a pipeline.
    """

    config: Any
    args: Any
    layers: tuple[int, int] | None
    dims: ParallelDims
    parts: list[Any]
    schedule: Any = None

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> degree, where it is above one."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
        return {name: degree for name in names if (degree := getattr(self.dims, name)) > 1}


def configured(arguments: list[str], ngpu: int) -> Any:
    """torchtitan's job configuration, set up so that a model can be built from it without an accelerator.

    Args:
        arguments: torchtitan's command line, with `--job.config_file X`.
        ngpu: number of ranks.
    """
    # Building on the meta device needs no accelerator, and this process should take no memory on one.
    os.environ.update(CUDA_VISIBLE_DEVICES="", NGPU=str(ngpu), WORLD_SIZE=str(ngpu), RANK="0", LOCAL_RANK="0")
    # Names in the tensor-parallel plan that belong to another pipeline stage.
    warnings.filterwarnings("ignore", message="Parallelize plan key")
    # The user's own modules are found from the current folder, as in the trainer, which `python -m` starts.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    config = ConfigManager().parse_args(arguments)
    if name := config.experimental.custom_import:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"experimental.custom_import = {name!r} cannot be imported: {error}") from None
    enable("cpu")
    return config


def spec_and_args(config: Any) -> tuple[Any, Any]:
    """torchtitan's TrainSpec and a copy of the flavor's model arguments. Raises ValueError for an unknown flavor."""
    try:
        spec = get_train_spec(config.model.name)
    except ImportError as error:
        raise ValueError(
            f"torchtitan's {config.model.name} cannot be imported: {error}; install its dependencies"
        ) from None
    if config.model.flavor not in spec.model_args:
        raise ValueError(
            f"{config.model.name} has no flavor {config.model.flavor!r}: it has {', '.join(sorted(spec.model_args))}"
        )
    return spec, deepcopy(spec.model_args[config.model.flavor])


def parallel_dims(config: Any, ngpu: int) -> ParallelDims:
    """torchtitan's ParallelDims of a run on `ngpu` ranks, as its trainer makes them."""
    degrees = config.parallelism
    return ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=degrees.context_parallel_degree,
        tp=degrees.tensor_parallel_degree,
        pp=degrees.pipeline_parallel_degree,
        ep=degrees.expert_parallel_degree,
        etp=degrees.expert_tensor_parallel_degree,
        world_size=ngpu,
    )


@contextmanager
def fake_rank(rank: int, ngpu: int) -> Iterator[None]:
    """A context in which this process is one rank of `ngpu`, whose collectives return at once and move nothing."""
    os.environ["RANK"] = str(rank)
    dist.init_process_group("fake", rank=rank, world_size=ngpu, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def built(config: Any, ngpu: int, rank: int, layers: int | None = None) -> Iterator[Built]:
    """Build the model of rank `rank` of `ngpu`; within the context this process is that rank.

    Args:
        config: torchtitan's job configuration, from `configured`.
        layers: transformer layers to keep; all if None.

    Raises:
        ValueError: the configuration cannot be built on this number of ranks.
    """
    config = deepcopy(config)
    # None of these changes a parameter; the first two need an accelerator, and the last needs compile.
    config.compile.enable = config.parallelism.enable_async_tensor_parallel = False
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    with fake_rank(rank, ngpu):
        try:
            model = _build(config, ngpu, layers)
        except ValueError:
            raise
        except Exception as error:
            message = " ".join(str(error).split()) or "no reason given"
            raise ValueError(
                f"torchtitan cannot build this configuration on {ngpu} ranks: {type(error).__name__}: {message}"
            ) from None
        yield model


def _build(config: Any, ngpu: int, layers: int | None) -> Built:
    spec, args = spec_and_args(config)
    dims = parallel_dims(config, ngpu)
    dims.build_mesh()  # torchtitan builds it on first use, which on one rank may be never
    args.update_from_config(config)
    total = getattr(args, "n_layers", None)
    if layers is not None:
        if total is None:
            raise ValueError(f"--layers cannot shorten {config.model.name}: its model arguments have no n_layers")
        if not 1 <= layers <= total:
            raise ValueError(f"--layers {layers} is not possible: the model has {total} layers")
        args.n_layers = layers
    layer_counts = None if total is None else (args.n_layers, total)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(args)
    if not dims.pp_enabled:
        return Built(config, args, layer_counts, dims, [spec.parallelize_fn(model, dims, config)])
    if spec.pipelining_fn is None:
        raise ValueError(f"{config.model.name} cannot be split into pipeline stages")
    loss = spec.build_loss_fn(config, parallel_dims=dims)
    schedule, parts, _, _ = spec.pipelining_fn(
        model, dims, config, torch.device("meta"), args, spec.parallelize_fn, loss
    )
    return Built(config, args, layer_counts, dims, parts, schedule)
