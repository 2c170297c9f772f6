"""AdamW, converted half way, beside AdamW going on: torchtitan's trainer on two ranks, real text, one seed checkpoint.

`python tests/show_seam.py` prints the losses across the seam, and AdamW's own spread over seeds to measure them by.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]

import corpus  # noqa: E402
from forked import CONFIG, GLOBAL_BATCH, SEQ_LEN, Trainer  # noqa: E402

SEAM, AFTER = 100, 50
SEEDS = (0, 1, 2, 3)
SETTINGS: dict[str, Any] = {
    "training.steps": SEAM + AFTER,
    "lr_scheduler.total_steps": SEAM + AFTER,
    "lr_scheduler.warmup_steps": 10,
    "checkpoint.interval": SEAM,
}


def main() -> None:
    """Run everything in a temporary folder."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus.build(
            work / "corpus", seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, steps=SEAM + AFTER, ranks=[1, 2], validation=8
        )
        runs = []
        for seed in SEEDS:
            trainer = Trainer(work / f"runs{seed}", work / "corpus", seed=seed)
            runs.append(trainer("adamw", ranks=2, data=2, **SETTINGS, **{"optimizer.name": "AdamW"}).losses)
        trainer = Trainer(work / "runs0", work / "corpus")
        converted = work / "converted" / f"step-{SEAM}"
        command = [sys.executable, "-m", "titan_adam_mini.cli", "convert", str(trainer.checkpoint("adamw", SEAM))]
        model = ["--job.config_file", str(CONFIG), "--model.flavor", "adam_mini_debug"]
        subprocess.run([*command, str(converted), "--to", "adam_mini", *model], check=True, cwd=ROOT)
        start = {"checkpoint.initial_load_path": converted, "checkpoint.initial_load_model_only": False}
        mini = trainer("mini", ranks=2, data=2, start=start, **SETTINGS).losses
    print(f"{'step':>5}{'AdamW':>9}{'AdamMini':>10}{'difference':>12}{'spread over seeds':>19}")
    inside, worst = 0, 0.0
    spreads = {}
    for step in range(SEAM + 1, SEAM + AFTER + 1):
        losses = [run[step] for run in runs]
        spreads[step] = max(losses) - min(losses)
        difference = abs(mini[step] - runs[0][step])
        worst = max(worst, difference)
        inside += difference <= 2 * spreads[step]
        if (step - SEAM) % 5 == 0 or step == SEAM + 1:
            print(f"{step:5}{runs[0][step]:9.4f}{mini[step]:10.4f}{difference:12.4f}{spreads[step]:19.4f}")
    mean = sum(spreads.values()) / AFTER
    print(f"{inside} of {AFTER} steps within twice the spread of that step; largest difference {worst:.4f}, ", end="")
    print(f"mean spread of {len(SEEDS)} seeds {mean:.4f}")


if __name__ == "__main__":
    main()
