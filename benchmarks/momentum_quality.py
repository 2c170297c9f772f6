"""What momentum in 2 or 1 bytes costs in loss: torchtitan's debug model, real text, the same seeds for every kind.

    python benchmarks/momentum_quality.py --steps 1000 --seeds 3 --out DIR [--at-once 6]

Every run of one seed starts from the same weights and sees the same documents in the same order. Writes
`momentum_quality.json` and prints the table: held-out loss per seed, the mean difference to float32 momentum over the
seeds, and beside it how far float32 momentum differs from itself over the seeds.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import corpus  # noqa: E402
from runs import train  # noqa: E402

SEQ_LEN, BATCH, VALIDATION = 256, 16, 256
FRESH = 700
"""Steps of documents; a standard library has no more text, and longer runs see it again."""
VARIANTS = "benchmarks.int8_variants"
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "AdamW": ({"optimizer.name": "AdamW"}, {}),
    "float32": ({"optimizer.adam_mini.momentum_dtype": "float32"}, {}),
    "bfloat16": ({"optimizer.adam_mini.momentum_dtype": "bfloat16"}, {}),
    "int8": ({"optimizer.adam_mini.momentum_dtype": "int8"}, {}),
    "int8, stochastic": (
        {
            "optimizer.adam_mini.momentum_dtype": "int8",
            "optimizer.implementation": "foreach",
            "experimental.custom_import": VARIANTS,
        },
        {"INT8_VARIANT": "stochastic"},
    ),
    "int8, companded": (
        {
            "optimizer.adam_mini.momentum_dtype": "int8",
            "optimizer.implementation": "foreach",
            "experimental.custom_import": VARIANTS,
        },
        {"INT8_VARIANT": "companded"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "momentum_quality")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time")
    parser.add_argument("--kinds", default=",".join(KINDS).replace("int8, ", "int8 "), help="comma-separated")
    args = parser.parse_args()
    names = [name for name in KINDS if name.replace(", ", " ") in args.kinds.split(",")]

    data = args.out / "data"
    built = corpus.build(
        data, seq_len=SEQ_LEN, global_batch=BATCH, steps=min(args.steps, FRESH), ranks=[1], validation=VALIDATION
    )
    print(f"Corpus: {built}", flush=True)
    common = {
        "model.flavor": "debugmodel",
        "model.hf_assets_path": data / "tokenizer",
        "optimizer.lr": 2e-3,
        "lr_scheduler.warmup_steps": 50,
        "lr_scheduler.decay_ratio": 0.8,
        "training.dataset_path": data / "train-1",
        "training.seq_len": SEQ_LEN,
        "training.local_batch_size": BATCH,
        "training.steps": args.steps,
        "metrics.log_freq": 50,
        "validation.enable": True,
        "validation.dataset_path": data / "validation",
        "validation.seq_len": SEQ_LEN,
        "validation.local_batch_size": BATCH,
        "validation.steps": VALIDATION // BATCH,
        "validation.freq": args.steps,
    }

    def run(job: tuple[str, int]) -> tuple[str, int, float, float]:
        name, seed = job
        settings, env = KINDS[name]
        label = f"{name.replace(', ', '-')}-{seed}"
        settings = {**common, **settings, "debug.seed": seed}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {"PYTHONPATH": path, "PYTORCH_ALLOC_CONF": "", "OMP_NUM_THREADS": "1", **env}
        config = ROOT / "train_configs" / "debug_model.toml"
        one = train(label, settings, ranks=1, out=args.out, config=config, env=env, time_limit=1800)
        print(f"{label}: {one.validation[args.steps]:.4f}", flush=True)
        return name, seed, one.validation[args.steps], one.losses[max(one.losses)]

    jobs = [(name, seed) for seed in range(args.seeds) for name in names]
    with ThreadPoolExecutor(args.at_once) as pool:
        results = list(pool.map(run, jobs))
    losses = {name: [held for kind, _, held, _ in results if kind == name] for name in names}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(
        "momentum",
        *(f"seed {seed}" for seed in range(args.seeds)),
        "mean",
        "difference to float32",
        "its error",
        title=f"Held-out loss after {args.steps} steps of {BATCH} x {SEQ_LEN} tokens, llama3 debugmodel; {where}, "
        f"torch {torch.__version__}",
    )
    for name in names:
        row = losses[name]
        paired = [one - two for one, two in zip(row, losses["float32"], strict=True)]
        spread = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")
        cells = [f"{one:.4f}" for one in (*row, statistics.mean(row))]
        difference = "" if name == "float32" else f"{statistics.mean(paired):+.4f}"
        table.add_row(name, *cells, difference, "" if name == "float32" else f"{spread:.4f}")
    Console(width=150).print(table)
    if args.seeds > 1:
        print(f"float32 momentum over seeds: standard deviation {statistics.stdev(losses['float32']):.4f}")
    record = {"device": where, "torch": torch.__version__, "steps": args.steps, "losses": losses}
    (args.out / "momentum_quality.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
