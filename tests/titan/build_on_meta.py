"""A configuration built at its real number of ranks in one process:
`python build_on_meta.py RANKS RANK [torchtitan's arguments]`.

Parameters are on the meta device and the process group is a fake one: the model is parallelised, blocked and planned
as the trainer would, and nothing is computed. Prints one line of JSON with what came out, then the partition table.
"""

import json
import sys
import time

from titan_adam_mini.offline.build import built, configured
from titan_adam_mini.titan.builder import optimizer_of


def main() -> None:
    """Read the command line, plan, print."""
    ranks, rank, *arguments = sys.argv[1:]
    started = time.monotonic()
    config = configured(arguments, int(ranks))
    with built(config, int(ranks), int(rank)) as model:
        (part,) = model.parts
        parallelised = time.monotonic()
        table = optimizer_of(part, config.optimizer, model.dims).table()
        seen = {
            "parameters": sum(param.numel() for param in part.parameters()),
            "local": sum(param.to_local().numel() for param in part.parameters()),
            "dp_shard": model.dims.dp_shard,
            "tp": model.dims.tp,
            "build_s": round(parallelised - started, 1),
            "plan_s": round(time.monotonic() - parallelised, 1),
        }
    print(json.dumps(seen))
    print(table)


if __name__ == "__main__":
    main()
