"""What the stages share: what they are told, what they answer, ranks; and the entry point of a stage's process."""

import argparse
import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Check:
    """What a stage is told.

    Attributes:
        device: "cuda" or "cpu".
        ngpu: number of ranks.
        limit: seconds that the stage may take.
        out: folder for logs.
        result: file for the answer.
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
        """Whether this is about GPUs."""
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
    """What a stage answers: whether all is as it should be, one line of numbers, and all numbers."""

    passed: bool
    line: str
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    def write(self, file: Path) -> None:
        """For the runner; a stage may do so before its end, lest a deadline takes everything."""
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=1, default=str))
        partial.replace(file)


class Skip(Exception):
    """Raised by a stage that does not apply here; the message says why."""


def need_cuda(check: Check, why: str) -> None:
    """Skip on a CPU."""
    if not check.cuda:
        raise Skip(f"{why} needs a GPU")


def on_ranks(check: Check, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The answers of `function(check, rank, *args)` on all ranks; it is a module's own, and they of built-in types."""
    with tempfile.TemporaryDirectory() as folder:
        if check.ngpu == 1:
            _rank(0, check, function, args, folder)
        else:
            import torch.multiprocessing as multiprocessing

            multiprocessing.spawn(_rank, (check, function, args, folder), nprocs=check.ngpu)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(check.ngpu)]


def _rank(rank: int, check: Check, function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    device = check.of_rank(rank)
    options: dict[str, Any] = {}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // check.ngpu) if check.cuda else 1)
    if check.cuda:
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(os.path.join(folder, "store"), check.ngpu)
    backend = "nccl" if check.cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=check.ngpu, store=store, **options)
    try:
        Path(folder, str(rank)).write_bytes(pickle.dumps(function(check, rank, *args)))
    finally:
        dist.destroy_process_group()


def engine_of(optimizer: Any, cuda: bool) -> str:
    """What computes, in words. On a GPU everything but the fused engine is an error: nothing may fall back unseen."""
    optimizer.init_state()
    line: str = optimizer._engine_line
    if cuda and not line.startswith("fused"):
        raise RuntimeError(f"AdamMini does not use its fused engine here: {line}")
    return line


def main() -> int:
    """Run one stage and write its answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--ngpu", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = vars(parser.parse_args())
    name = options.pop("stage")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as an interrupt does: unwinding ends what the stage has started
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    check = Check(**options, started=time.monotonic())
    try:
        result = importlib.import_module(f"gpu_check.{name}").run(check)
    except Skip as reason:
        result = Result(True, str(reason), skipped=True)
    except Exception as error:
        traceback.print_exc()
        words = " | ".join(line.strip() for line in str(error).strip().splitlines()[:4])
        result = Result(False, f"{type(error).__name__}: {words}"[:300])
    result.write(check.result)
    print(result.line, flush=True)
    return 0 if result.passed else 1


if __name__ == "__main__":
    # The stage's module imports this one by its own name, whose classes would be other ones.
    from gpu_check import stage

    sys.exit(stage.main())
