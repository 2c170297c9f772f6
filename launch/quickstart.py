"""AdamW and AdamMini side by side in torchtitan, on real text, from one seed checkpoint; started by quickstart.sh.

Runs `titan-adam-mini compare` twice: both optimizers on all GPUs or two CPU ranks, then AdamMini on one rank. It exits
with status 1 and a hint if a run fails or a loss does not fall as expected.
"""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus

from titan_adam_mini.compare.record import Record
from titan_adam_mini.tools.trainer import arguments

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "train_configs" / "debug_model.toml"
SEQ_LEN, BATCH, VALIDATION = 256, 8, 64
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
FELL_TO = 0.6  # of the first loss: far below what a run that does not learn reaches
WORSE_BY = 0.03

TOML_LINES = """\
[experimental]
custom_import = "titan_adam_mini.titan"
[job]
custom_config_module = "titan_adam_mini.titan.job_config"  # only for the settings under [optimizer.adam_mini]
[optimizer]
name = "AdamMini\""""


class Failed(Exception):
    """A run that failed or did not learn; the message gives the reason and where to look."""


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of the two optimizers")
    parser.add_argument("--compared-steps", type=int, default=40, help="steps of the run on one rank")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quickstart", help="folder for logs and runs")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="folder for corpus and tokenizer")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # like an interrupt: unwinding ends the comparison and its runs
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    started = time.monotonic()
    try:
        quickstart(options.steps, min(options.compared_steps, options.steps), options.out.resolve(), options.cache)
    except Failed as failure:
        log(f"\nFAILED: {failure}")
        return 1
    log(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def quickstart(steps: int, compared_steps: int, out: Path, cache: Path) -> None:
    """Run the comparisons and print their results. Raises Failed if a run fails or a check does not pass."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # With one GPU, one rank and two are compared on the CPU.
    ranks, many = gpus or 2, max(gpus, 2)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "2 CPU ranks (no GPU found)"
    log(f"torch {torch.__version__}, {where}")
    batch = max(1, BATCH // many) * many
    data = cache / "quickstart"
    counts = sorted({1, ranks, many})
    built = corpus.build(data, seq_len=SEQ_LEN, global_batch=batch, steps=steps, ranks=counts, validation=VALIDATION)
    log(f"Corpus: {built}")

    def settings(count: int, last: int) -> dict[str, Any]:
        return {
            "model.hf_assets_path": data / "tokenizer",
            "training.dataset_path": data / f"train-{count}",
            "training.local_batch_size": batch // count,
            "training.seq_len": SEQ_LEN,
            "training.steps": last,
            "lr_scheduler.total_steps": steps,
            "validation.enable": True,
            "validation.dataset_path": data / "validation",
            "validation.local_batch_size": batch // count,
            "validation.steps": max(1, VALIDATION // batch),
            "validation.seq_len": SEQ_LEN,
            "validation.freq": last,
        }

    log(f"\nAdamW and AdamMini on {_ranks(ranks)}: {steps} steps of {batch} x {SEQ_LEN} tokens")
    both = out / "optimizers"
    compare("AdamW,AdamMini", ranks, both, settings(ranks, steps))
    seed = both / "seeds" / "seed-0" / "checkpoint" / "step-0"
    start = {"checkpoint.enable": True, "checkpoint.load_only": True, "checkpoint.initial_load_path": seed}
    log(f"\nAdamMini again from the same checkpoint, on 1 rank: {compared_steps} steps")
    environment = {} if gpus != 1 else CPU_ONLY
    compare("AdamMini", 1, out / "one_rank", {**settings(1, compared_steps), **start}, environment)
    sharded = both
    if gpus == 1:
        log(f"and on {_ranks(many)}, on the CPU")
        sharded = out / "sharded"
        compare("AdamMini", many, sharded, {**settings(many, compared_steps), **start}, environment)

    log("\nResults")
    adamw, mini = _record(both, "AdamW"), _record(both, "AdamMini")
    show_losses(adamw, mini, steps)
    show_state(both)
    show_ranks(_record(out / "one_rank", "AdamMini"), _record(sharded, "AdamMini"), compared_steps, sharded)
    log(f"  speed               AdamW {adamw.tokens_per_second:,.0f} tokens/s, AdamMini {mini.tokens_per_second:,.0f}")
    log(f"  report              {_relative(both)}/report.md")
    log(f"  Finished runs are not repeated: remove {_relative(out)} to train again.")
    log(f"\nTo use AdamMini in your own run, add to its TOML file:\n\n{TOML_LINES}\n")


def compare(
    optimizers: str, ranks: int, out: Path, settings: dict[str, Any], environment: dict[str, str] | None = None
) -> None:
    """`titan-adam-mini compare` with one seed. Raises Failed if it fails, after it has printed the reason."""
    flags = ["--optimizers", optimizers, "--seeds", "1", "--ngpu", str(ranks), "--out", str(out)]
    if status := run(["compare", str(CONFIG), *flags, *arguments(settings)], environment or {}):
        raise Failed(f"the comparison ended with status {status}: see above, and train.log of the run below {out}")


def run(words: list[str], environment: dict[str, str]) -> int:
    """The exit status of a command of titan-adam-mini."""
    # In its own session it gets no signals from the terminal: this process forwards one.
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_adam_mini.cli", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def show_losses(adamw: Record, mini: Record, steps: int) -> None:
    """Check that both losses fell far enough, and compare AdamMini's last loss with AdamW's."""
    log("    step     AdamW  AdamMini  ratio")
    for step in sorted({1, *range(20, steps + 1, 20), steps}):
        first, second = (record.losses[step - 1] for record in (adamw, mini))
        log(f"  {step:6d}  {first:8.4f}  {second:8.4f}  {second / first:.3f}")
    for name, record in (("AdamW", adamw), ("AdamMini", mini)):
        first, last = record.losses[0], record.losses[-1]
        if not last <= FELL_TO * first:  # also when it is not a number
            raise Failed(
                f"{name}'s loss went from {first:.4f} to {last:.4f} in {steps} steps, but should have fallen to "
                f"{FELL_TO} of the first. With few steps that is expected: omit --steps"
            )
        fell = f"loss {first:.4f} -> {last:.4f} ({last / first:.2f} of the first)"
        log(f"  {name:18s}  {fell}, on held-out text {record.final:.4f}")
    worse = mini.losses[-1] / adamw.losses[-1] - 1
    verdict = "within 3%" if worse <= WORSE_BY else "MORE than the expected 3%"
    log(f"  AdamMini's last     {abs(worse):.1%} {'above' if worse > 0 else 'below'} AdamW's: {verdict}")


def show_state(out: Path) -> None:
    """Bytes of optimizer state per parameter."""
    with open(out / "runs.csv", encoding="utf-8") as file:
        state = {row["variant"]: float(row["state_bytes_per_parameter"]) for row in csv.DictReader(file)}
    log(f"  optimizer state     AdamW {state['AdamW']:.2f} bytes per parameter, AdamMini {state['AdamMini']:.2f}")


def show_ranks(one: Record, many: Record, steps: int, out: Path) -> None:
    """The largest difference between the losses of one rank and of several, and the number of heads that shards cut."""
    pairs = zip(one.losses[:steps], many.losses[:steps], strict=True)
    difference = max(abs(first - second) for first, second in pairs)
    trained = (out / many.run.folder / "train.log").read_text(errors="replace")
    found = re.search(r"(\d+) heads? cut", trained)
    cut = f"{found[1] if found else 'no'} heads cut"
    label = f"1 and {many.ranks} ranks"
    log(f"  {label:18s}  losses differ by at most {difference:.1e} in {steps} steps, {cut}")


def log(text: str) -> None:
    """Print without buffering."""
    print(text, flush=True)


def _record(out: Path, optimizer: str) -> Record:
    return Record.load(next(out.glob(f"runs/{optimizer}/*/*/record.json")))


def _ranks(count: int) -> str:
    return f"{count} ranks, FSDP2" if count > 1 else "1 rank"


def _relative(path: Path) -> Path:
    """The path relative to the repository, if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
