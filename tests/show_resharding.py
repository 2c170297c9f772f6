"""Prints, for every pair of meshes: largest relative difference to a run without a break, and what is equal to the bit.

`python tests/show_resharding.py`
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from injected import on_one_device
from meshes import CATALOGUE
from resharding import PAIRS, STEPS, moved

from titan_adam_mini.check.oracle import error

KINDS = ("params", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Every pair in float64."""
    print(f"{'saved on':24}{'loaded on':24}{'parameters':>12}{'second moments':>16}  loaded = saved")
    for saved_on, loaded_on in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            saved, loaded, after = moved(saved_on, loaded_on, torch.float64, Path(folder))
        want = on_one_device(CATALOGUE[loaded_on].sizes, steps=STEPS)
        worst = {kind: max(error(after[kind][key], value) for key, value in want[kind].items()) for kind in KINDS}
        bits = all(torch.equal(loaded[kind][key], value) for kind in KINDS for key, value in saved[kind].items())
        print(
            f"{saved_on:24}{loaded_on:24}{worst['params']:12.1e}{worst['exp_avg_sq']:16.1e}  "
            f"{'to the bit' if bits else 'NO'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
