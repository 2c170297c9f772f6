"""A configuration built at its real number of ranks in one process:
`python build_on_meta.py RANKS RANK [torchtitan's arguments]`.

Parameters are on the meta device and the process group is a fake one: the model is parallelised, blocked and planned
as the trainer would, and nothing is computed. Prints one line of JSON with what came out, then the partition table.
"""

import importlib
import json
import os
import sys
import time
from typing import Any


def plan(config: Any, ranks: int, rank: int) -> tuple[dict[str, Any], str]:
    """Numbers about the plan of one rank of `ranks`, and its partition table."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.distributed import ParallelDims
    from torchtitan.protocols.train_spec import get_train_spec
    from torchtitan.tools.utils import set_default_dtype

    from titan_adam_mini.titan.builder import optimizer_of

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    degrees = config.parallelism
    dims = ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=degrees.context_parallel_degree,
        tp=degrees.tensor_parallel_degree,
        pp=degrees.pipeline_parallel_degree,
        ep=degrees.expert_parallel_degree,
        etp=degrees.expert_tensor_parallel_degree,
        world_size=ranks,
    )
    spec = get_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    args.update_from_config(config)
    started = time.monotonic()
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(args)
    total = sum(param.numel() for param in model.parameters())
    model = spec.parallelize_fn(model, dims, config)
    parallelised = time.monotonic()
    optimizer = optimizer_of(model, config.optimizer, dims)
    table = optimizer.table()
    seen = {
        "parameters": total,
        "local": sum(param.to_local().numel() for param in model.parameters()),
        "dp_shard": dims.dp_shard,
        "tp": dims.tp,
        "build_s": round(parallelised - started, 1),
        "plan_s": round(time.monotonic() - parallelised, 1),
    }
    return seen, table


def main() -> None:
    """Read the command line, plan, print."""
    ranks, rank, *arguments = sys.argv[1:]
    os.environ.update(NGPU=ranks, WORLD_SIZE=ranks, RANK=rank, LOCAL_RANK="0")
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(arguments)
    importlib.import_module(config.experimental.custom_import)
    seen, table = plan(config, int(ranks), int(rank))
    print(json.dumps(seen))
    print(table)


if __name__ == "__main__":
    main()
