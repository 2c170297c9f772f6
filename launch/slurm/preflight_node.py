"""Facts of one node before a long run, and all-reduce measurements of one rank; started by preflight.py.

python preflight_node.py facts FOLDER TOKEN
python preflight_node.py allreduce GROUPS GPUS SECONDS
"""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

MIB = 1 << 20
LARGEST = 1024 * MIB
"""Bytes of the largest message; a smaller one is used if it takes SETTLED seconds."""
SETTLED, MEASURED = 0.2, 2.0


def facts(folder: Path, token: str) -> None:
    """Compare `folder/head` with the head node's token, and write this node's facts to `folder/NODE.json`.

    Raises:
        SystemExit: with a message, if the folder cannot be read or written.
    """
    try:
        read = (folder / "head").read_text()
    except OSError as error:
        sys.exit(f"cannot read {folder}/head, written by the head node: {error.strerror}")
    if read != token:
        sys.exit(f"{folder}/head differs from what the head node wrote: the folder is not shared")
    content = json.dumps({"token": token, **_facts()})
    try:
        (folder / f"{os.environ['SLURMD_NODENAME']}.json").write_text(content)
    except OSError as error:
        sys.exit(f"cannot write to {folder}: {error.strerror}")


def _facts() -> dict[str, Any]:
    errors = []
    for name in ("torch", "torchtitan", "titan_adam_mini.titan"):
        try:
            importlib.import_module(name)
        except Exception as error:
            errors.append(f"cannot import {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            break  # the following ones need it
    torch = sys.modules.get("torch")
    package = sys.modules.get("titan_adam_mini")
    gpus = torch.cuda.device_count() if torch else 0
    return {
        "errors": errors,
        "address": (_output("hostname", "-I").split() or [socket.gethostname()])[0],
        "gpus": gpus,
        "GPU": ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)})) if torch else "",
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "torchtitan": _version("torchtitan"),
        "titan_adam_mini": _version("titan-adam-mini"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version()))
        if torch and torch.distributed.is_nccl_available()
        else "",
        "commit": _commit(Path(str(package.__file__)).parent) if package else "",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    for module in ("nvidia", "amdgpu"):
        if (version := Path("/sys/module") / module / "version").exists():
            return version.read_text().strip()
    return ""


def _commit(folder: Path) -> str:
    return _output("git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def allreduce(groups: list[dict[str, Any]], gpus: int, seconds: float) -> None:
    """Measure the all-reduce of this node's group, with one rank per GPU, or per node without GPUs.

    Args:
        groups: each with `nodes`, and the `address` and `port` at which they meet, an address of the first node.
        gpus: GPUs per node to use.
        seconds: the deadline; ranks wait half of it for each other, to have time to report a timeout.
    """
    import torch
    import torch.distributed as dist

    node, local, per_node = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_LOCALID"]), max(gpus, 1)
    group = next(candidate for candidate in groups if node in candidate["nodes"])
    rank, ranks = group["nodes"].index(node) * per_node + local, len(group["nodes"]) * per_node
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", local % torch.cuda.device_count())  # Slurm may have assigned one to each rank
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=seconds / 2)
    store = dist.TCPStore(group["address"], group["port"], ranks, rank == 0, timeout=timeout)
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    rate, size = _rate(device, ranks)
    now = time.time()  # all ranks finish the last all-reduce at the same time
    dist.barrier()
    dist.destroy_process_group()
    if local == 0:
        print(f"preflight {node} report {json.dumps({'rate': rate, 'bytes': size, 'time': now})}", flush=True)


def _rate(device: Any, ranks: int) -> tuple[float, int]:
    """Bus bandwidth in GB/s, as defined by NCCL's tests, and the message size in bytes; the same on all ranks."""
    import torch
    import torch.distributed as dist

    def seconds_of(message: torch.Tensor, times: int) -> float:
        """Seconds per all-reduce, on the slowest rank."""
        _agree(0.0, device)
        begin = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return _agree((time.perf_counter() - begin) / times, device)

    size = MIB
    while True:
        message = torch.zeros(size // 4, device=device)
        seconds_of(message, 1)  # creates buffers and connections
        if (once := seconds_of(message, 1)) >= SETTLED or size >= LARGEST:
            break
        size *= 2
    seconds = seconds_of(message, max(1, math.ceil(MEASURED / once)))
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9, size


def _agree(seconds: float, device: Any) -> float:
    import torch
    import torch.distributed as dist

    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        facts(Path(sys.argv[2]), sys.argv[3])
    else:
        allreduce(json.loads(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
