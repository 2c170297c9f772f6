"""What this machine is: device, memory, driver, versions, and which optional packages are there."""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch
from runs import ROOT

from gpu_check.stage import Check, Result

PACKAGES = ("triton", "torchtitan", "torchao", "torchdata", "datasets", "tokenizers", "tensorboard", "tyro", "numba")


def run(check: Check) -> Result:
    """Fails if there are fewer GPUs than ranks."""
    versions = {name: _version(name) for name in PACKAGES}
    numbers: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None),
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "packages": versions,
    }
    there = f"torch {torch.__version__}, triton {versions['triton']}, Python {numbers['python']}"
    commit = f"commit {numbers['commit'] or 'unknown'}"
    missing = [name for name, version in versions.items() if version is None]
    tail = f"{commit}; not installed: {', '.join(missing) or 'nothing'}"
    if not check.cuda:
        return Result(True, f"CPU, {check.ngpu} ranks over gloo; {there}, {tail}", numbers)
    if torch.cuda.device_count() < check.ngpu:
        return Result(
            False, f"{torch.cuda.device_count()} GPUs found, {check.ngpu} asked for; {there}, {tail}", numbers
        )
    one = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    numbers |= {
        "gpu": one.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{one.major}.{one.minor}",
        "multiprocessors": one.multi_processor_count,
        "bytes": total,
        "bytes_free": free,
        "driver": (driver or "unknown").splitlines()[0],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
    what = f"{check.ngpu} x {one.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free), driver {numbers['driver']}"
    return Result(True, f"{what}, CUDA {torch.version.cuda}, NCCL {numbers['nccl']}; {there}, {tail}", numbers)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The output of a command, if it is there and answers."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
