"""Peak memory of `titan-adam-mini convert`, on an AdamW checkpoint of over 2 GB.

`python tests/show_convert_memory.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MODEL = ["--job.config_file", str(ROOT / "train_configs" / "debug_model.toml"), "--model.flavor", "wide"]
MODEL += ["--experimental.custom_import", "wide_flavor"]
# Not getrusage: a process started from a large one inherits its peak there.
RUN = """
import re, sys
from titan_adam_mini.cli import main
main(sys.argv[1:])
print("PEAK", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def write(folder: Path) -> None:
    """AdamW's checkpoint of the flavour, with random state."""
    from titan_adam_mini.offline.build import configured
    from titan_adam_mini.offline.full_model import target_of

    blocks, group, _ = target_of(configured(MODEL, ngpu=1), "adamw")
    state: dict[str, Any] = {"optimizer": {}, "train_state": {"step": 7}}
    for name, one in blocks.items():
        state[name] = torch.randn(one.shape)
        state["optimizer"] |= {f"param_groups.{name}.{key}": value for key, value in group.items()}
        state["optimizer"] |= {
            f"state.{name}.exp_avg": torch.randn(one.shape),
            f"state.{name}.exp_avg_sq": torch.rand(one.shape),
            f"state.{name}.step": torch.tensor(7.0),
        }
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def main() -> None:
    """Both ways."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write(work / "adamw" / "step-7")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        for source, to in (("adamw", "adam_mini"), ("adam_mini", "adamw")):
            target = work / ("again" if to == "adamw" else to) / "step-7"
            words = ["convert", str(work / source / "step-7"), str(target), "--to", to, *MODEL]
            done = subprocess.run(
                [sys.executable, "-c", RUN, *words], env=environment, check=True, text=True, stdout=subprocess.PIPE
            )
            from titan_adam_mini.checkpoint.stored import Stored

            stored = Stored(work / source / "step-7")
            largest = max(entry.size.numel() * entry.properties.dtype.itemsize for entry in stored.tensors.values())
            peak = int(done.stdout.split("PEAK")[1]) * 1024
            bound = 4 * largest + 500 * 10**6
            print(
                f"--to {to}: checkpoint {stored.size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, "
                f"peak {peak / 1e6:.0f} MB, bound 4 x largest + 500 MB = {bound / 1e6:.0f} MB: "
                f"{'within' if peak <= bound else 'ABOVE'}"
            )


if __name__ == "__main__":
    main()
