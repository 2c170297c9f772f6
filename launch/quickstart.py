"""AdamW and AdamMini side by side in torchtitan, on real text, from one seed checkpoint; started by quickstart.sh.

Every line it prints is about something that just happened. It ends with status 1, and says what to do, when a run
fails or a loss does not fall as it should.
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
FELL_TO = 0.6  # of the first loss: far below what a run that does not learn reaches
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
    parser.add_argument("--compared-steps", type=int, default=40, help="steps for which 1 rank is held against many")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quickstart", help="where logs and runs go")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where corpus and tokenizer are kept")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as an interrupt does: unwinding ends the ranks of a run
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    started = time.monotonic()
    try:
        quickstart(options.steps, min(options.compared_steps, options.steps), options.out.resolve(), options.cache)
    except RunFailed as failure:
        print(f"\nFAILED: {failure}", flush=True)
        print("Read the log named above; the command that a run used is in launch/runs.py. Nothing else was changed.")
        return 1
    say(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def quickstart(steps: int, compared_steps: int, out: Path, cache: Path) -> None:
    """The runs and what they showed. Raises RunFailed at the first thing that is not as it should be."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = gpus or 2
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "2 CPU ranks (no GPU found)"
    local_batch = max(1, 8 // ranks)
    global_batch = local_batch * ranks
    say(f"torch {torch.__version__}, {where}")

    many = ranks if ranks > 1 else 2  # one GPU cannot be two ranks: the comparison then runs on the CPU
    many_env = {} if ranks > 1 else CPU_ONLY
    data = cache / "quickstart"
    built = corpus.build(data, seq_len=SEQ_LEN, global_batch=global_batch, steps=steps, ranks=[1, many], validation=64)
    say(f"Corpus: {built}")

    for name in ("seed", "adamw", "adam_mini", "one_rank", "sharded"):
        # torchtitan goes on from checkpoints that it finds there; --out may hold anything else, which stays.
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
    say(f"Seed checkpoint written to {relative(seed)}; every run below starts from it")

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
    say(f"\nAdamW, {sharding(ranks)}, {steps} steps of {global_batch} x {SEQ_LEN} tokens")
    say("  step     AdamW")
    settings = {**long, "optimizer.name": "AdamW"}
    adamw = train("adamw", settings, ranks=ranks, out=out, config=CONFIG, on_step=Table(steps))
    say("AdamMini, the same ranks, seed, documents and hyper-parameters")
    say("  step     AdamW  AdamMini  ratio")
    settings = {**long, "optimizer.name": "AdamMini"}
    mini = train("adam_mini", settings, ranks=ranks, out=out, config=CONFIG, on_step=Table(steps, beside=adamw))

    short = {"training.steps": compared_steps, "optimizer.name": "AdamMini"}
    say(f"\nAdamMini again from the seed, {compared_steps} steps on 1 rank")
    one = train("one_rank", {**on(1), **short}, ranks=1, out=out, config=CONFIG, env=many_env, on_step=silent)
    sharded = mini
    if ranks == 1:
        say(f"and on {many} CPU ranks, FSDP2")
        settings = {**on(many), **short}
        sharded = train("sharded", settings, ranks=many, out=out, config=CONFIG, env=many_env, on_step=silent)

    say("\nWhat the runs showed")
    check_losses(adamw, mini, steps)
    show_state(out, steps)
    show_ranks(one, sharded, compared_steps)
    say(f"  speed               AdamW {adamw.tokens_per_second:,.0f} tokens/s, AdamMini {mini.tokens_per_second:,.0f}")
    say(f"  logs                {relative(out)}/*.log")
    say("\nThese lines in the TOML file of a run of your own use it:\n\n" + TOML_LINES + "\n")


class Table:
    """Prints a run's losses as they fall: the first step, every tenth and the last; beside another run's, if given."""

    def __init__(self, steps: int, beside: Run | None = None) -> None:
        self.steps, self.beside = steps, beside

    def __call__(self, run: Run, step: int) -> None:
        if step != 1 and step % 10 != 0 and step != self.steps:
            return
        loss = run.losses[step]
        if self.beside is None:
            say(f"{step:6d}  {loss:8.4f}")
        else:
            other = self.beside.losses[step]
            say(f"{step:6d}  {other:8.4f}  {loss:8.4f}  {loss / other:.3f}")


def silent(run: Run, step: int) -> None:
    """For runs whose steps are not printed, but must be there."""


def check_losses(adamw: Run, mini: Run, steps: int) -> None:
    """Both losses fell far enough; how AdamMini's last one compares."""
    for name, run in (("AdamW", adamw), ("AdamMini", mini)):
        if steps not in run.losses:
            raise RunFailed(f"{name} stopped at step {max(run.losses)} of {steps}; log: {run.log}")
        first, last = run.losses[min(run.losses)], run.losses[steps]
        if not last <= FELL_TO * first:  # also when it is not a number
            raise RunFailed(
                f"{name}'s loss went from {first:.4f} to {last:.4f} in {steps} steps, and should have come down to "
                f"{FELL_TO} of the first. With few steps that is expected: leave --steps out. Log: {run.log}"
            )
        fell = f"loss {first:.4f} -> {last:.4f} ({last / first:.2f} of the first)"
        say(f"  {name:18s}  {fell}, held-out text {run.validation[steps]:.4f}")
    worse = mini.losses[steps] / adamw.losses[steps] - 1
    verdict = "within 3%" if worse <= WORSE_BY else "MORE than the 3% that were expected"
    say(f"  AdamMini's last     {abs(worse):.1%} {'above' if worse > 0 else 'below'} AdamW's: {verdict}")


def show_state(out: Path, steps: int) -> None:
    """Bytes of optimizer state per parameter, as the two runs' last checkpoints hold them."""
    adamw, _, parameters = optimizer_bytes(out / "adamw" / "checkpoint" / f"step-{steps}")
    mini, seconds, _ = optimizer_bytes(out / "adam_mini" / "checkpoint" / f"step-{steps}")
    say(
        f"  optimizer state     {adamw / parameters:.2f} -> {(mini - seconds) / parameters:.2f} bytes per parameter, "
        f"plus {seconds / parameters:.3f} for one second moment per block ({parameters:,} parameters)"
    )


def show_ranks(one: Run, many: Run, steps: int) -> None:
    """The largest difference between the losses of one rank and of many, and how many heads the shards cut."""
    difference = max(abs(one.losses[step] - many.losses[step]) for step in range(1, steps + 1))
    cut = next((found[1] for line in many.lines if (found := re.search(r"(\d+) heads? cut", line))), None)
    if cut is None:
        raise RunFailed(f"The optimizer's log does not say how many heads are cut; log: {many.log}")
    label = f"1 and {many.ranks} ranks"
    say(f"  {label:18s}  losses differ by at most {difference:.1e} in {steps} steps, {cut} heads cut")


def sharding(ranks: int) -> str:
    """How the run is spread, in words."""
    return f"{ranks} ranks, FSDP2" if ranks > 1 else "1 rank"


def relative(path: Path) -> Path:
    """The path as seen from the repository's top, where it is below it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def say(text: str) -> None:
    """Print now, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
