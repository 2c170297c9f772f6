"""Shared by the stages: their inputs and results, and how they start ranks."""

import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..files import atomic_write


@dataclass(frozen=True)
class Context:
    """The inputs of a stage.

    Attributes:
        device: "cuda" or "cpu".
        ngpu: number of ranks.
        limit: seconds that the stage may take.
        out: folder for logs.
        result: file for the result.
        started: `time.monotonic()` at the start of the stage.
    """

    device: str
    ngpu: int
    limit: float
    out: Path
    result: Path
    started: float

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds left for this stage."""
        return self.started + self.limit - time.monotonic()

    def of_rank(self, rank: int) -> torch.device:
        """The device of a rank of this machine."""
        return torch.device("cuda", rank) if self.cuda else torch.device("cpu")


@dataclass
class Result:
    """The result of a stage: whether it passed, a one-line summary, and all measurements."""

    passed: bool
    line: str
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    def write(self, file: Path) -> None:
        """Write it for the runner; a stage may do so early, so that partial results survive a deadline."""
        atomic_write(file, json.dumps(asdict(self), indent=1, default=str), sync=False)


class Skip(Exception):
    """Raised by a stage that does not apply; the message is the reason."""


def need_cuda(context: Context, why: str) -> None:
    """Skip on a CPU."""
    if not context.cuda:
        raise Skip(f"{why} needs a GPU")


def on_ranks(context: Context, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(context, rank, *args)` on all ranks: built-in types, from a module-level function."""
    with tempfile.TemporaryDirectory() as folder:
        if context.ngpu == 1:
            _rank(0, context, function, args, folder)
        else:
            import torch.multiprocessing as multiprocessing

            multiprocessing.spawn(_rank, (context, function, args, folder), nprocs=context.ngpu)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(context.ngpu)]


def _rank(rank: int, context: Context, function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    device = context.of_rank(rank)
    options: dict[str, Any] = {}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.ngpu) if context.cuda else 1)
    if context.cuda:
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(os.path.join(folder, "store"), context.ngpu)
    backend = "nccl" if context.cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=context.ngpu, store=store, **options)
    try:
        Path(folder, str(rank)).write_bytes(pickle.dumps(function(context, rank, *args)))
    finally:
        dist.destroy_process_group()


def engine_of(optimizer: Any, cuda: bool) -> str:
    """The name of the engine. On a GPU any but the fused one is an error, so that no fallback goes unnoticed."""
    optimizer.init_state()
    line: str = optimizer._engine_line
    if cuda and not line.startswith("fused"):
        raise RuntimeError(f"AdamMini does not use its fused engine here: {line}")
    return line
