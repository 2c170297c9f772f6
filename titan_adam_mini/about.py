"""What a machine and its packages are, for captions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch


def device_name(device: torch.device, threads: int) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"


def version(package: str) -> str:
    """Of an installed package; "" if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
