"""torchtitan's own trainer with AdamW and with AdamMini, from one seed, on real text.

The model is the largest Llama 3 of `sizes` that fits on the device; on a CPU a small one, for a few steps, without
checking memory.
"""

import math
import re
from typing import Any

import torch

from ...tools.trainer import RunFailed
from ..sizes import SMALL, Size, fitting
from ..stage import Context, Result
from ..trainer import measurements, need_packages, settings_of, train

SEQ_LEN = 2048
STEPS, FEWER = 50, 30
WORSE = 0.10
"""AdamMini's last loss, relative to AdamW's."""


def run(context: Context) -> Result:
    """Passes if both end with similar finite losses, and AdamMini has the lower peak memory."""
    need_packages()
    seq_len = SEQ_LEN if context.cuda else 64
    steps = 8 if not context.cuda else STEPS if context.left > 130 else FEWER
    common = settings_of(context, seq_len, steps)
    print(f"dataset built, {context.left:.0f} s left", flush=True)
    if not context.cuda:
        common |= {"training.mixed_precision_param": "float32", "activation_checkpoint.mode": "none"}
    sizes = _fitting(context.ngpu) if context.cuda else [SMALL]

    found: dict[str, Any] = {"steps": steps, "seq_len": seq_len, "refused": []}
    for size in sizes:
        name = f"check_{size.name}"
        settings = {**common, "model.flavor": name, "optimizer.name": "AdamW"}
        try:
            adamw = train(context, "adamw", settings, (context.left - 5) * 0.6)
            break
        except RunFailed as failure:
            if "OutOfMemory" not in str(failure) or size is sizes[-1]:
                raise
            print(f"{name} does not fit: {failure}", flush=True)
            found["refused"].append(name)
    found["flavor"], found["AdamW"] = name, measurements(adamw)
    model = f"{name}, {steps} steps of {context.ngpu} x {seq_len} tokens"
    unfinished = f"{model}: AdamW {summary(found['AdamW'])}; AdamMini did not end"
    Result(False, unfinished, found).write(context.result)
    settings = {**common, "model.flavor": name, "optimizer.name": "AdamMini"}
    mini = train(context, "adam_mini", settings, context.left - 5)
    found["AdamMini"] = measurements(mini)
    found["engine"] = next((match[1] for line in mini.lines if (match := re.search(r"engine (.*?); \d", line))), "")
    wrong = faults(found["AdamW"], found["AdamMini"], steps, context.cuda)
    if context.cuda and not found["engine"].startswith("fused"):
        wrong.append(f"engine {found['engine'] or 'unknown'}")
    line = f"{model}: AdamW {summary(found['AdamW'])}; AdamMini {summary(found['AdamMini'])}"
    return Result(not wrong, "; ".join([*wrong, line]), found)


def summary(numbers: dict[str, Any]) -> str:
    """The numbers of a run in one line."""
    return (
        f"loss {numbers['losses'][0]:.3f} -> {numbers['losses'][-1]:.3f}, grad norm {numbers['grad_norms'][-1]:.2f}, "
        f"{numbers['tokens_per_second']:,.0f} tokens/s, peak {numbers['peak_active_gib']:.2f} GiB active and "
        f"{numbers['peak_reserved_gib']:.2f} reserved"
    )


def faults(adamw: dict[str, Any], mini: dict[str, Any], steps: int, memory: bool) -> list[str]:
    """Descriptions of all faults."""
    found = []
    for name, numbers in (("AdamW", adamw), ("AdamMini", mini)):
        if len(numbers["losses"]) != steps or not all(map(math.isfinite, numbers["losses"] + numbers["grad_norms"])):
            found.append(f"{name} has {len(numbers['losses'])} losses of {steps}, or not all are finite")
    if not abs(mini["losses"][-1] / adamw["losses"][-1] - 1) <= WORSE:
        found.append(f"AdamMini's last loss is not within {WORSE:.0%} of AdamW's")
    if memory and not mini["peak_active_gib"] < adamw["peak_active_gib"]:
        found.append("AdamMini's peak is not lower")
    return found


def _fitting(ranks: int) -> list[Size]:
    """The sizes that fit, queried in a separate process: a CUDA context here would take memory from the runs."""
    import torch.multiprocessing as multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        free = pool.apply(_free)
    return fitting(free, ranks, SEQ_LEN)


def _free() -> int:
    return int(torch.cuda.mem_get_info(0)[0])
