"""AdamW and AdamMini side by side in torchtitan, on real text, from one seed checkpoint; started by quickstart.sh.

It exits with status 1 and a hint if a run fails or a loss does not fall as expected.
"""

import argparse
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import corpus
from runs import ROOT, Run, RunFailed, optimizer_bytes, train

SEQ_LEN = 256
CONFIG = ROOT / "train_configs" / "debug_model.toml"
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
FELL_TO = 0.6  # of the first loss: far below that of a run that does not learn
WORSE_BY = 0.03

TOML_LINES = """\
[experimental]
custom_import = "titan_adam_mini.titan"
[job]
custom_config_module = "titan_adam_mini.titan.job_config"  # only for the settings under [optimizer.adam_mini]
[optimizer]
name = "AdamMini\""""


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of the two long runs")
    parser.add_argument(
        "--compared-steps", type=int, default=40, help="steps for which 1 rank is compared with several"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quickstart", help="folder for logs and runs")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="folder for corpus and tokenizer")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # like an interrupt: unwinding ends the ranks of a run
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    started = time.monotonic()
    try:
        quickstart(options.steps, min(options.compared_steps, options.steps), options.out.resolve(), options.cache)
    except RunFailed as failure:
        print(f"\nFAILED: {failure}", flush=True)
        print("See the log named above; the command of a run is in launch/runs.py.")
        return 1
    print_line(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def quickstart(steps: int, compared_steps: int, out: Path, cache: Path) -> None:
    """Run the comparison and print its results. Raises RunFailed if a run fails or a check does not pass."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = gpus or 2
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "2 CPU ranks (no GPU found)"
    local_batch = max(1, 8 // ranks)
    global_batch = local_batch * ranks
    print_line(f"torch {torch.__version__}, {where}")

    many = ranks if ranks > 1 else 2  # with one GPU the comparison of ranks runs on the CPU
    many_env = {} if ranks > 1 else CPU_ONLY
    data = cache / "quickstart"
    built = corpus.build(data, seq_len=SEQ_LEN, global_batch=global_batch, steps=steps, ranks=[1, many], validation=64)
    print_line(f"Corpus: {built}")

    for name in ("seed", "adamw", "adam_mini", "one_rank", "sharded"):
        # torchtitan resumes from existing checkpoints; other files in --out are kept.
        shutil.rmtree(out / name / "checkpoint", ignore_errors=True)
    seed = out / "seed" / "checkpoint" / "step-0"
    common = {
        "model.hf_assets_path": data / "tokenizer",
        "training.dataset_path": data / "train-1",
        "training.seq_len": SEQ_LEN,
        "training.steps": steps,
        "lr_scheduler.total_steps": steps,
        "checkpoint.enable": True,
    }
    from_scratch = {**common, "checkpoint.create_seed_checkpoint": True, "debug.seed": 0}
    train("seed", from_scratch, ranks=1, out=out, config=CONFIG)
    print_line(f"Seed checkpoint written to {relative(seed)}; all runs below start from it")

    def on(count: int) -> dict[str, Any]:
        return {
            **common,
            "checkpoint.initial_load_path": seed,
            "training.dataset_path": data / f"train-{count}",
            "training.local_batch_size": global_batch // count,
        }

    long = {
        **on(ranks),
        "checkpoint.last_save_model_only": False,
        "validation.enable": True,
        "validation.dataset_path": data / "validation",
        "validation.seq_len": SEQ_LEN,
        "validation.local_batch_size": local_batch,
        "validation.freq": steps,
    }
    print_line(f"\nAdamW, {sharding(ranks)}, {steps} steps of {global_batch} x {SEQ_LEN} tokens")
    print_line("  step     AdamW")
    settings = {**long, "optimizer.name": "AdamW"}
    adamw = train("adamw", settings, ranks=ranks, out=out, config=CONFIG, on_step=Table(steps))
    print_line("AdamMini, the same ranks, seed, documents and hyper-parameters")
    print_line("  step     AdamW  AdamMini  ratio")
    settings = {**long, "optimizer.name": "AdamMini"}
    mini = train("adam_mini", settings, ranks=ranks, out=out, config=CONFIG, on_step=Table(steps, beside=adamw))

    short = {"training.steps": compared_steps, "optimizer.name": "AdamMini"}
    print_line(f"\nAdamMini again from the seed, {compared_steps} steps on 1 rank")
    one = train("one_rank", {**on(1), **short}, ranks=1, out=out, config=CONFIG, env=many_env, on_step=silent)
    sharded = mini
    if ranks == 1:
        print_line(f"and on {many} CPU ranks, FSDP2")
        settings = {**on(many), **short}
        sharded = train("sharded", settings, ranks=many, out=out, config=CONFIG, env=many_env, on_step=silent)

    print_line("\nResults")
    check_losses(adamw, mini, steps)
    show_state(out, steps)
    show_ranks(one, sharded, compared_steps)
    print_line(
        f"  speed               AdamW {adamw.tokens_per_second:,.0f} tokens/s, AdamMini {mini.tokens_per_second:,.0f}"
    )
    print_line(f"  logs                {relative(out)}/*.log")
    print_line("\nTo use AdamMini in your own run, add to its TOML file:\n\n" + TOML_LINES + "\n")


class Table:
    """Prints a run's losses at the first, every tenth and the last step, beside another run's if given."""

    def __init__(self, steps: int, beside: Run | None = None) -> None:
        self.steps, self.beside = steps, beside

    def __call__(self, run: Run, step: int) -> None:
        if step != 1 and step % 10 != 0 and step != self.steps:
            return
        loss = run.losses[step]
        if self.beside is None:
            print_line(f"{step:6d}  {loss:8.4f}")
        else:
            other = self.beside.losses[step]
            print_line(f"{step:6d}  {other:8.4f}  {loss:8.4f}  {loss / other:.3f}")


def silent(run: Run, step: int) -> None:
    """For runs whose steps are required but not printed."""


def check_losses(adamw: Run, mini: Run, steps: int) -> None:
    """Check that both losses fell far enough, and compare AdamMini's last loss with AdamW's."""
    for name, run in (("AdamW", adamw), ("AdamMini", mini)):
        if steps not in run.losses:
            raise RunFailed(f"{name} stopped at step {max(run.losses)} of {steps}; log: {run.log}")
        first, last = run.losses[min(run.losses)], run.losses[steps]
        if not last <= FELL_TO * first:  # also when it is not a number
            raise RunFailed(
                f"{name}'s loss went from {first:.4f} to {last:.4f} in {steps} steps, but should have fallen to "
                f"{FELL_TO} of the first. With few steps that is expected: omit --steps. Log: {run.log}"
            )
        fell = f"loss {first:.4f} -> {last:.4f} ({last / first:.2f} of the first)"
        print_line(f"  {name:18s}  {fell}, held-out text {run.validation[steps]:.4f}")
    worse = mini.losses[steps] / adamw.losses[steps] - 1
    verdict = "within 3%" if worse <= WORSE_BY else "MORE than the expected 3%"
    print_line(f"  AdamMini's last     {abs(worse):.1%} {'above' if worse > 0 else 'below'} AdamW's: {verdict}")


def show_state(out: Path, steps: int) -> None:
    """Print the bytes of optimizer state per parameter in the two runs' last checkpoints."""
    adamw, _, parameters = optimizer_bytes(out / "adamw" / "checkpoint" / f"step-{steps}")
    mini, seconds, _ = optimizer_bytes(out / "adam_mini" / "checkpoint" / f"step-{steps}")
    print_line(
        f"  optimizer state     {adamw / parameters:.2f} -> {(mini - seconds) / parameters:.2f} bytes per parameter, "
        f"plus {seconds / parameters:.3f} for one second moment per block ({parameters:,} parameters)"
    )


def show_ranks(one: Run, many: Run, steps: int) -> None:
    """Print the largest difference between the losses of one and several ranks, and the number of cut heads."""
    difference = max(abs(one.losses[step] - many.losses[step]) for step in range(1, steps + 1))
    cut = next((found[1] for line in many.lines if (found := re.search(r"(\d+) heads? cut", line))), None)
    if cut is None:
        raise RunFailed(f"The number of cut heads is missing in the log: {many.log}")
    label = f"1 and {many.ranks} ranks"
    print_line(f"  {label:18s}  losses differ by at most {difference:.1e} in {steps} steps, {cut} heads cut")


def sharding(ranks: int) -> str:
    """The parallelism of a run, as text."""
    return f"{ranks} ranks, FSDP2" if ranks > 1 else "1 rank"


def relative(path: Path) -> Path:
    """The path relative to the repository if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def print_line(text: str) -> None:
    """Print and flush."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
