"""torchtitan's own trainer with AdamW and with AdamMini, from one seed, on real text.

The model is the largest Llama 3 of `sizes` that the device takes; on a CPU the debug model, for a few steps, and memory
is not judged.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import corpus
import torch
from runs import ROOT, Run, RunFailed, train

from gpu_check.sizes import fitting
from gpu_check.stage import Check, Result, Skip

SEQ_LEN = 2048
STEPS, FEWER = 50, 30
WORSE = 0.10
NEEDED = ("torchtitan", "tokenizers", "datasets", "torchdata", "tyro")
_NORM = re.compile(r"step:\s*(\d+)\s+loss:.*?grad_norm:\s*([-+0-9.einfa]+)")
_PEAK = re.compile(r"peak active: ([\d.]+)GiB reserved: ([\d.]+)GiB")


def run(check: Check) -> Result:
    """Passes if both end with finite losses close to each other, and AdamMini with the lower peak."""
    need_packages()
    out = check.out / "train"
    small = not check.cuda
    seq_len = 64 if small else SEQ_LEN
    steps = 8 if small else STEPS if check.left > 130 else FEWER
    data = data_of(check, seq_len, STEPS)
    print(f"corpus built, {check.left:.0f} s left", flush=True)
    common = {**settings_of(data, check, seq_len, steps), "debug.seed": 0}
    config = ROOT / "train_configs" / ("debug_model.toml" if small else "llama3_8b.toml")
    names = ["adam_mini_debug"] if small else ["check_" + one.name for one in _fitting(check.ngpu)]

    numbers: dict[str, Any] = {"steps": steps, "seq_len": seq_len, "refused": []}
    for name in names:
        try:
            settings = {**common, "model.flavor": name, "optimizer.name": "AdamW"}
            adamw = trainer_with("adamw", settings, check, out, config, (check.left - 5) * 0.6)
            break
        except RunFailed as failure:
            if "OutOfMemory" not in str(failure) or name == names[-1]:
                raise
            print(f"{name} does not fit: {failure}", flush=True)
            numbers["refused"].append(name)
    numbers["flavor"], numbers["AdamW"] = name, said(adamw)
    told = f"{name}, {steps} steps of {check.ngpu} x {seq_len} tokens"
    Result(False, f"{told}: AdamW {words(numbers['AdamW'])}; AdamMini did not end", numbers).write(check.result)
    settings = {**common, "model.flavor": name, "optimizer.name": "AdamMini"}
    mini = trainer_with("adam_mini", settings, check, out, config, check.left - 5)
    numbers["AdamMini"] = said(mini)
    numbers["engine"] = next((found[1] for line in mini.lines if (found := re.search(r"engine (.*?); \d", line))), "")
    wrong = faults(numbers["AdamW"], numbers["AdamMini"], steps, check.cuda)
    if check.cuda and not numbers["engine"].startswith("fused"):
        wrong.append(f"engine {numbers['engine'] or 'unknown'}")
    line = f"{told}: AdamW {words(numbers['AdamW'])}; AdamMini {words(numbers['AdamMini'])}"
    return Result(not wrong, f"{'; '.join([*wrong, line])}", numbers)


def need_packages() -> None:
    """Skip where torchtitan, or what it and the corpus import, is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed")


def trainer_with(name: str, settings: dict[str, Any], check: Check, out: Path, config: Path, limit: float) -> Run:
    """A run of torchtitan's trainer; steps must be there."""
    env = {"TRAIN_FILE": "gpu_check.trainer"}
    return train(name, settings, ranks=check.ngpu, out=out, config=config, env=env, on_step=_silent, time_limit=limit)


def data_of(check: Check, seq_len: int, steps: int) -> Path:
    """Real text for this number of ranks, one sequence per rank and step, and its tokenizer."""
    folder = check.out / f"corpus-{seq_len}"
    corpus.build(folder, seq_len=seq_len, global_batch=check.ngpu, steps=steps, ranks=[check.ngpu], validation=1)
    return folder


def settings_of(data: Path, check: Check, seq_len: int, steps: int) -> dict[str, Any]:
    """What all runs of the check have in common."""
    return {
        "experimental.custom_import": "gpu_check.flavor",
        "model.hf_assets_path": data / "tokenizer",
        "training.dataset": "c4_test",
        "training.dataset_path": data / f"train-{check.ngpu}",
        "training.seq_len": seq_len,
        "training.local_batch_size": 1,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": max(1, steps // 5),
        "metrics.log_freq": 1,
        "metrics.enable_tensorboard": False,
        "metrics.disable_color_printing": True,
        "checkpoint.enable": False,
        "compile.enable": check.cuda,
    }


def said(one: Run) -> dict[str, Any]:
    """Numbers from the log of a run."""
    norms = {int(found[1]): float(found[2]) for line in one.lines if (found := _NORM.search(line))}
    peaks = [(float(found[1]), float(found[2])) for line in one.lines if (found := _PEAK.search(line))]
    return {
        "losses": list(one.losses.values()),
        "grad_norms": list(norms.values()),
        "tokens_per_second": one.tokens_per_second,
        "peak_active_gib": max((active for active, _ in peaks), default=math.nan),
        "peak_reserved_gib": max((reserved for _, reserved in peaks), default=math.nan),
    }


def words(one: dict[str, Any]) -> str:
    """The numbers of a run in one line."""
    return (
        f"loss {one['losses'][0]:.3f} -> {one['losses'][-1]:.3f}, grad norm {one['grad_norms'][-1]:.2f}, "
        f"{one['tokens_per_second']:,.0f} tokens/s, peak {one['peak_active_gib']:.2f} GiB active and "
        f"{one['peak_reserved_gib']:.2f} reserved"
    )


def faults(adamw: dict[str, Any], mini: dict[str, Any], steps: int, memory: bool) -> list[str]:
    """What is not as it should be, in words."""
    found = []
    for name, one in (("AdamW", adamw), ("AdamMini", mini)):
        if len(one["losses"]) != steps or not all(map(math.isfinite, one["losses"] + one["grad_norms"])):
            found.append(f"{name} has {len(one['losses'])} losses of {steps}, or not all are finite")
    if not abs(mini["losses"][-1] / adamw["losses"][-1] - 1) <= WORSE:
        found.append(f"AdamMini's last loss is not within {WORSE:.0%} of AdamW's")
    if memory and not mini["peak_active_gib"] < adamw["peak_active_gib"]:
        found.append("AdamMini's peak is not lower")
    return found


def _fitting(ranks: int) -> list[Any]:
    """Asked in a process that ends: a CUDA context of our own would take memory from the runs."""
    import torch.multiprocessing as multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        free = pool.apply(_free)
    return fitting(free, ranks, SEQ_LEN)


def _free() -> int:
    return int(torch.cuda.mem_get_info(0)[0])


def _silent(run: Run, step: int) -> None:
    """Steps must be there."""
