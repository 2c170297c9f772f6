"""Settings that torchtitan's trainer would refuse only after the nodes are allocated, refused early with a remedy.

torchtitan checks these late (`train.py`, the parallelize functions, the first forward pass), by assertions. Checks of
its parallelize and pipelining functions are not repeated here: the plan runs these functions.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torchtitan.hf_datasets import text_datasets

from titan_adam_mini.partition.geometry import Geometry
from titan_adam_mini.titan.builder import check_settings
from titan_adam_mini.titan.checkpoint import start_of
from titan_adam_mini.titan.private import model_converters


def check_run(config: Any, spec: Any, args: Any, ngpu: int) -> None:
    """Raise ValueError for settings with which a run of AdamMini cannot start.

    Args:
        config: torchtitan's job configuration.
        spec: its TrainSpec.
        args: its model arguments.
        ngpu: number of ranks.
    """
    check_settings(config.optimizer, fault_tolerant=config.fault_tolerance.enable)
    start_of(config.checkpoint)
    # Only the first is raised: each check assumes that those before it have passed.
    for message in chain(_mesh(config.parallelism, ngpu), _model(config, args), _training(config, spec, ngpu)):
        raise ValueError(message)


def data_ranks(degrees: Any, ngpu: int) -> int:
    """The number of ranks that see different documents; `degrees` is torchtitan's ``[parallelism]`` section."""
    return ngpu // (degrees.context_parallel_degree * degrees.tensor_parallel_degree * degrees.pipeline_parallel_degree)


def _mesh(degrees: Any, ngpu: int) -> Iterator[str]:
    named = {
        "data_parallel_replicate_degree": degrees.data_parallel_replicate_degree,
        "context_parallel_degree": degrees.context_parallel_degree,
        "tensor_parallel_degree": degrees.tensor_parallel_degree,
        "pipeline_parallel_degree": degrees.pipeline_parallel_degree,
    }
    shard = degrees.data_parallel_shard_degree
    others = {"expert_parallel_degree": degrees.expert_parallel_degree}
    others["expert_tensor_parallel_degree"] = degrees.expert_tensor_parallel_degree
    for name, degree in {**named, **others}.items():
        if degree < 1:
            yield f"parallelism.{name} = {degree} is not possible: it must be 1 or more"
    if shard < 1 and shard != -1:
        yield (
            f"parallelism.data_parallel_shard_degree = {shard} is not possible: it must be 1 or more, or -1 for the "
            "remaining ranks"
        )
    product = 1
    for degree in named.values():
        product *= degree
    listed = ", ".join(f"{name} {degree}" for name, degree in named.items() if degree > 1)
    if shard == -1 and ngpu % product:
        yield (
            f"the mesh does not divide {ngpu} ranks: {listed} make {product}. Choose degrees whose product divides "
            "the number of ranks"
        )
    if shard != -1 and product * shard != ngpu:
        listed = f"data_parallel_shard_degree {shard}{', ' + listed if listed else ''}"
        yield (
            f"the mesh has {product * shard} ranks and the run {ngpu}: {listed}. Set data_parallel_shard_degree = -1, "
            "which takes the remaining ranks, or another number of ranks"
        )
    rest = ngpu // (degrees.data_parallel_replicate_degree * degrees.pipeline_parallel_degree)
    experts = degrees.expert_parallel_degree * degrees.expert_tensor_parallel_degree
    if degrees.expert_parallel_degree > 1 and rest % experts:
        yield (
            f"expert_parallel_degree {degrees.expert_parallel_degree} x expert_tensor_parallel_degree "
            f"{degrees.expert_tensor_parallel_degree} does not divide the {rest} ranks that shard the experts"
        )


def _model(config: Any, args: Any) -> Iterator[str]:
    tp, heads = config.parallelism.tensor_parallel_degree, Geometry.of(args)
    for name, count in (("attention heads", heads.n_heads), ("key and value heads", heads.n_kv_heads)):
        if count is not None and count % tp:
            yield (
                f"tensor_parallel_degree {tp} does not divide the {count} {name} of {config.model.name} "
                f"{config.model.flavor}: torchtitan's attention needs whole heads on every rank"
            )
    experts = getattr(getattr(args, "moe_args", None), "num_experts", None)
    if experts is not None and experts % config.parallelism.expert_parallel_degree:
        yield f"expert_parallel_degree {config.parallelism.expert_parallel_degree} does not divide {experts} experts"
    known = model_converters()
    for name in config.model.converters:
        if name not in known:
            yield f"model.converters has {name!r}, which torchtitan does not know: it has {', '.join(known) or 'none'}"


def _training(config: Any, spec: Any, ngpu: int) -> Iterator[str]:
    training, compiled = config.training, config.compile.enable and "model" in config.compile.components
    ranks = data_ranks(config.parallelism, ngpu)
    if training.local_batch_size < 1:
        yield f"training.local_batch_size = {training.local_batch_size} is not possible: it must be 1 or more"
    step = training.local_batch_size * ranks
    if training.global_batch_size >= 0 and (training.global_batch_size == 0 or training.global_batch_size % step):
        yield (
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of local_batch_size "
            f"{training.local_batch_size} x {ranks} data-parallel ranks = {step}: choose one that is, or -1"
        )
    if config.activation_checkpoint.mode == "memory_budget" and not compiled:
        yield 'activation_checkpoint.mode = "memory_budget" needs compile.enable = true with "model" in its components'
    if (
        config.parallelism.enable_async_tensor_parallel
        and not compiled
        and config.parallelism.tensor_parallel_degree > 1
    ):
        yield 'enable_async_tensor_parallel needs compile.enable = true with "model" in its components'
    if config.checkpoint.enable and config.checkpoint.keep_latest_k == 1:
        yield "checkpoint.keep_latest_k = 1 is refused by torchtitan: keep 2 or more, or 0 for all"
    own = spec.build_dataloader_fn is text_datasets.build_text_dataloader
    if own and training.dataset not in text_datasets.DATASETS:
        yield f"training.dataset {training.dataset!r} is unknown: torchtitan has {', '.join(text_datasets.DATASETS)}"
