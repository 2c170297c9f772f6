"""Shows the exchange under way while other blocks are updated: `python tests/show_overlap.py [--trace FILE.json]`.

Two ranks over gloo, FSDP2's placements, one step seen by torch.profiler on rank 0, to which rank 1 comes LATE seconds
late. Heads of the queries are cut, so their sums must be waited for; the MLP's rows are whole, and updated meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from ranks import run  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

from titan_adam_mini import AdamMini  # noqa: E402

SHAPES = {
    **{f"layers.{number}.attention.wq.weight": (3 * 64, 512) for number in range(4)},
    **{f"layers.{number}.feed_forward.w1.weight": (2048, 512) for number in range(4)},
    **{f"layers.{number}.attention_norm.weight": (512,) for number in range(4)},
}
LATE = 0.02
NAMES = ("AdamMini.exchange", "gloo:all_reduce", "AdamMini.update", "AdamMini.wait")


def profiled(rank: int, world: int, file: str) -> str:
    """The engine that ran; rank 0 writes the trace of its sixth step."""
    mesh = init_device_mesh("cpu", (world,))
    params = [
        (name, torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)])))
        for name, shape in SHAPES.items()
    ]
    optimizer = AdamMini(params, n_heads=3, n_kv_heads=3)
    for step in range(6):
        for _, param in params:
            param.grad = torch.ones_like(param)
        if step < 5:
            optimizer.step()
    torch.distributed.barrier()
    with torch.profiler.profile() as seen:
        time.sleep(LATE * rank)
        optimizer.step()
    if rank == 0:
        seen.export_chrome_trace(file)
    return str(optimizer._engine_line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="keep the chrome trace here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        engine = run(profiled, 2, str(file))[0]
        events = json.loads(file.read_text())["traceEvents"]
        if args.trace:
            shutil.copy(file, args.trace)
    spans = sorted(
        (float(one["ts"]), float(one["dur"]), one["name"])
        for one in events
        if one.get("ph") == "X" and one["name"] in NAMES
    )
    print(f"engine {engine}; microseconds from the start of the step")
    for start, length, name in spans:
        print(f"{name:20s} {start - spans[0][0]:8.0f} -> {start - spans[0][0] + length:8.0f}")
    updated, waited = (next(one for one in spans if one[2] == name) for name in ("AdamMini.update", "AdamMini.wait"))
    print(
        f"{waited[0] - updated[0]:.0f} us of updates between sending the sums and waiting for them; the wait took "
        f"{waited[1]:.0f} us"
    )


if __name__ == "__main__":
    main()
