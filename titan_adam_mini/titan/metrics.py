"""Adds bytes of state, parameters and gradients to torchtitan's metrics, for `log_memory = true`.

Installed by the first optimizer that is built with that setting; other runs use torchtitan's own code.
"""

import logging
from collections import Counter
from typing import Any

import torchtitan.components.metrics as titan_metrics
from torchtitan.components.metrics import MetricsProcessor

from titan_adam_mini.titan.log import log_on_rank_0
from titan_adam_mini.titan.replaced import replace
from titan_adam_mini.titan.storages import storages

GIB = 1 << 30


def install() -> None:
    """Make torchtitan's MetricsProcessor log the bytes of optimizers with `log_memory`."""
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
    """Wraps torchtitan's: adds metrics, and logs the sizes in bytes once."""
    if getattr(processor.optimizers, "log_memory", False):
        sizes = storage_bytes(processor.optimizers)
        extra_metrics = {**(extra_metrics or {}), **_figures(sizes)}
        if not getattr(processor, "_logged_memory", False):
            message = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            log_on_rank_0(logging.INFO, f"AdamMini: bytes on this rank: {message}.")
        processor._logged_memory = True
    original(processor, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)


def storage_bytes(container: Any) -> dict[str, int]:
    """Bytes of this rank's storages: optimizer_state and its parts, parameters, gradients."""
    sizes: Counter[str] = Counter()
    for storage in storages(container):
        sizes[storage.category.replace(" ", "_")] += storage.size
        if storage.key:
            sizes[storage.key] += storage.size
    first = ["optimizer_state", "exp_avg", "exp_avg_scale", "exp_avg_sq", "step", "parameters", "gradients"]
    return {name: sizes[name] for name in first if name in sizes}


def _figures(sizes: dict[str, int]) -> dict[str, float]:
    """Metrics with torchtitan's naming, in GiB, and the allocated peak if the device reports it."""
    figures = {f"memory/{name}(GiB)": size / GIB for name, size in sizes.items() if name != "step"}
    stats = titan_metrics.device_module.memory_stats()
    if "allocated_bytes.all.peak" in stats:
        figures["memory/max_allocated(GiB)"] = stats["allocated_bytes.all.peak"] / GIB
    return figures
