"""The paper's memory figures for Llama 2 7B on two GPUs of 80 GB, beside what the simulation says of the same run.

    python benchmarks/paper_memory.py [any of torchtitan's --section.key value]

The paper (arXiv 2406.16793) reports 53.92 and 26.96 GB of fp32 state, and that AdamW trains with one sequence per GPU
and Adam-mini with four. It does not say with which activation checkpointing, how much memory was left free, or by which
code the loss was computed, so every mode of checkpointing is shown. Takes several minutes.
"""

import json
import sys
import tempfile
from pathlib import Path

from titan_adam_mini.cli import main

CONFIG = Path(__file__).resolve().parents[1] / "train_configs" / "llama2_7b.toml"
NGPU, BUDGET, RESERVE = 2, "80GiB", "6GiB"
STATE = {"AdamW": 53.92, "AdamMini": 26.96}
"""GB, of all GPUs together."""
BATCH = {"AdamW": 1, "AdamMini": 4}


def compare(found: dict, names: tuple[str, ...] = ("AdamW", "AdamMini")) -> list[str]:
    """The paper's figures and the simulation's, in sentences, of the JSON that `estimate --fit` writes."""
    (run,) = found["runs"]
    lines = []
    for name in names:
        held = run["optimizers"][name]["phases"][1]["held"]["optimizer state"]
        state = held * NGPU / 1e9
        verdict = "agrees" if abs(state / STATE[name] - 1) < 0.001 else "CONTRADICTS"
        lines.append(f"{name}: state {state:.2f} GB here, {STATE[name]} GB in the paper: {verdict} (to 0.1 %)")
    for fit in found["fit"]:
        name, one = fit["optimizer"], fit["found"]
        verdict = "agrees" if one["value"] == BATCH[name] else "CONTRADICTS"
        sizes = " and ".join(f"{size / 2**30:.1f}" for size in (one["peak"], one["beyond"]) if size)
        lines.append(
            f"{name}, checkpointing {fit['checkpointing']}: largest batch {one['value']} here ({sizes} GiB with one "
            f"more), {BATCH[name]} in the paper: {verdict}"
        )
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ["--ngpu", str(NGPU), "--fit", BUDGET, "--reserve", RESERVE, "--vary", "local batch"]
        main(["estimate", str(CONFIG), *words, "--json", str(file), *sys.argv[1:]])
        print("\n".join(compare(json.loads(file.read_text()))))
