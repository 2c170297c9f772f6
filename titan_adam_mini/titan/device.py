"""The feature "cpu": torchtitan on a machine without an accelerator, the CPU as its device, gloo as its backend.

torchtitan 0.2 falls back to "cuda" if it finds no device, and queries its name and memory. This file gives it a device
module that reports on this process. If there is an accelerator, nothing in this file has an effect.
"""

import logging
import os
import resource
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import FSDPModule

from titan_adam_mini.private import _get_available_device_type
from titan_adam_mini.titan.gloo import keep_exit_code
from titan_adam_mini.titan.replaced import replace

logger = logging.getLogger("titan_adam_mini")


class CpuDevice:
    """The part of ``torch.cuda``'s interface that torchtitan calls, implemented for the CPU and this process.

    Memory is the resident memory of the process, in bytes; its peak is since the start of the process, because the
    operating system does not reset it. All other attributes come from ``torch.cpu``.
    """

    __name__ = "titan_adam_mini.titan.device.CpuDevice"

    def __getattr__(self, name: str) -> Any:
        if name == "memory":
            raise ValueError(
                "[profiling] enable_memory_snapshot records the allocator of a GPU, but this run is on the CPU: set it "
                "to false"
            )
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """An index, as required by ``torch.distributed.barrier(device_ids=...)``; ``torch.cpu`` returns "cpu"."""
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return SimpleNamespace(name="CPU", total_memory=total)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Nothing to reset: see the class."""

    def empty_cache(self) -> None:
        """The CPU has no caching allocator."""


_cpu: CpuDevice | None = None


def has_accelerator() -> bool:
    """Whether torchtitan finds a device other than the CPU."""
    return _get_available_device_type() is not None


def install() -> None:
    """Make torchtitan use the CPU if there is no accelerator; done and logged once."""
    global _cpu
    if _cpu is not None or has_accelerator():
        return
    old_type, old_module = titan_utils.device_type, titan_utils.device_module
    _cpu = CpuDevice()
    for name, module in list(sys.modules.items()):
        # torchtitan's modules copy the two names when they are imported, and `python -m torchtitan.train` is __main__.
        if name != "__main__" and name.split(".")[0] != "torchtitan":
            continue
        names = getattr(module, "__dict__", {})
        if names.get("device_module") is old_module:
            setattr(module, "device_module", _cpu)  # noqa: B010
        if names.get("device_type") == old_type:
            setattr(module, "device_type", "cpu")  # noqa: B010
    replace(torch, "histc", histc_of_integers)
    keep_exit_code()
    logger.info("No accelerator found: torchtitan runs on the CPU with gloo; memory figures are those of the process.")


def histc_of_integers(original: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps `torch.histc`: accepts integers on the CPU too, as on CUDA. torchtitan's routers count tokens with it."""
    if x.is_floating_point() or x.device.type != "cpu":
        return original(x, *args, **kwargs)
    return original(x.double(), *args, **kwargs).to(x.dtype)


def prepare_model_parts(model_parts: list[Any]) -> None:
    """On the CPU, make FSDP reduce gradients with a plain sum, which gloo supports; elsewhere no effect.

    torchtitan disables FSDP's gradient division with a factor of 1, which FSDP implements as a pre-multiplied sum, and
    gloo does not support that. A plain sum has the same result.
    """
    if _cpu is None:
        return
    for part in model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
