"""torchtitan's metrics with what AdamMini holds beside torchtitan's own memory figures, for `log_memory = true`.

The first optimizer that is built with that setting puts it there; other runs go through torchtitan's own code.
"""

import logging
from collections import Counter
from typing import Any

import torchtitan.components.metrics as titan_metrics
from torchtitan.components.metrics import MetricsProcessor

from titan_adam_mini.titan.held import held
from titan_adam_mini.titan.log import log_on_rank_0
from titan_adam_mini.titan.replaced import replace

GIB = 1 << 30


def install() -> None:
    """Have torchtitan's MetricsProcessor log the bytes of optimizers with `log_memory`."""
    replace(MetricsProcessor, "log", log_with_memory)


def log_with_memory(
    original: Any,
    processor: Any,
    step: int,
    global_avg_loss: float,
    global_max_loss: float,
    grad_norm: float,
    extra_metrics: dict[str, Any] | None = None,
) -> None:
    """Around torchtitan's: a few figures more; one line in the log says the sizes in bytes, the first time."""
    if getattr(processor.optimizers, "log_memory", False):
        sizes = bytes_held(processor.optimizers)
        extra_metrics = {**(extra_metrics or {}), **_figures(sizes)}
        if not getattr(processor, "_logged_memory", False):
            message = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            log_on_rank_0(logging.INFO, f"AdamMini: bytes held by this rank: {message}.")
        processor._logged_memory = True
    original(processor, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)


def bytes_held(container: Any) -> dict[str, int]:
    """Bytes of this rank's storages: optimizer_state and, after it, its parts; parameters; gradients."""
    sizes: Counter[str] = Counter()
    for one in held(container):
        sizes[one.category.replace(" ", "_")] += one.size
        if one.key:
            sizes[one.key] += one.size
    first = ["optimizer_state", "exp_avg", "exp_avg_scale", "exp_avg_sq", "step", "parameters", "gradients"]
    return {name: sizes[name] for name in first if name in sizes}


def _figures(sizes: dict[str, int]) -> dict[str, float]:
    """Under torchtitan's names, in GiB; the peak of what was allocated, where the device counts it."""
    figures = {f"memory/{name}(GiB)": size / GIB for name, size in sizes.items() if name != "step"}
    stats = titan_metrics.device_module.memory_stats()
    if "allocated_bytes.all.peak" in stats:
        figures["memory/max_allocated(GiB)"] = stats["allocated_bytes.all.peak"] / GIB
    return figures
