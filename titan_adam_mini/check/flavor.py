"""The custom import of the check's torchtitan runs: sizes of Llama 3 as flavors, and peak memory in the log.

torchtitan logs only reserved memory; the line added here also has active memory.
"""

from typing import Any

import torchtitan.models.llama3 as llama3
from torchtitan.components.metrics import DeviceMemoryMonitor
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.tools.logging import logger

import titan_adam_mini.titan  # noqa: F401

from .sizes import SIZES, SMALL

PREFIX = "check_"

for size in (*SIZES, SMALL):
    llama3.llama3_args[PREFIX + size.name] = TransformerModelArgs(
        dim=size.dim,
        n_layers=size.layers,
        n_heads=size.heads,
        n_kv_heads=size.kv_heads,
        vocab_size=size.vocab,
        ffn_dim_multiplier=size.multiplier,
        multiple_of=size.multiple,
        rope_theta=500000,
    )

_get_peak_stats = DeviceMemoryMonitor.get_peak_stats


def _get_and_log_peak_stats(self: Any) -> Any:
    stats = _get_peak_stats(self)
    logger.info(f"peak active: {stats.max_active_gib:.4f}GiB reserved: {stats.max_reserved_gib:.4f}GiB")
    return stats


DeviceMemoryMonitor.get_peak_stats = _get_and_log_peak_stats
