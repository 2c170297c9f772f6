"""This machine: device, memory, driver, versions, and installed optional packages."""

import platform
import shutil
import subprocess
from typing import Any

import torch

from ...tools.versions import commit, version
from ..stage import Context, Result

PACKAGES = ("triton", "torchtitan", "torchao", "torchdata", "datasets", "tokenizers", "tensorboard", "tyro", "numba")


def run(context: Context) -> Result:
    """Fails if there are fewer GPUs than ranks."""
    versions = {name: version(name) for name in PACKAGES}
    numbers: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None),
        "version": version("titan-adam-mini"),
        "commit": commit(),
        "packages": versions,
    }
    software = f"torch {torch.__version__}, triton {versions['triton']}, Python {numbers['python']}"
    source = f"commit {numbers['commit']}" if numbers["commit"] else f"titan-adam-mini {numbers['version']}"
    missing = [name for name, there in versions.items() if not there]
    tail = f"{source}; not installed: {', '.join(missing) or 'nothing'}"
    if not context.cuda:
        return Result(True, f"CPU, {context.ngpu} ranks over gloo; {software}, {tail}", numbers)
    if torch.cuda.device_count() < context.ngpu:
        return Result(
            False, f"{torch.cuda.device_count()} GPUs found, {context.ngpu} asked for; {software}, {tail}", numbers
        )
    one = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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
    what = f"{context.ngpu} x {one.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free), driver {numbers['driver']}"
    return Result(True, f"{what}, CUDA {torch.version.cuda}, NCCL {numbers['nccl']}; {software}, {tail}", numbers)


def _output(*command: str) -> str | None:
    """The output of a command; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
