"""Names and versions of this machine's hardware and packages, for captions and records."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device, threads: int) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"


def version(package: str) -> str:
    """The version of an installed package; "" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this package's repository, with `-dirty` if files were changed; "" without a repository."""
    package = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        if git("ls-files", "--", Path(__file__).name):  # else the repository only contains the environment
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return ""


def provenance(device: str) -> dict[str, str]:
    """Device, versions and, if there is one, the commit, for the record of a run."""
    versions = ", ".join(f"{name} {version(name)}".strip() for name in ("titan-adam-mini", "torchtitan", "torch"))
    return {"device": device, "versions": versions, **({"commit": sha} if (sha := commit()) else {})}
