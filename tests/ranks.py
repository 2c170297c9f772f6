"""A pool of gloo ranks, started once per test run: `run(fn, world_size, *args)` calls `fn(rank, world_size, *args)`.

Workers are plain processes on loopback, forked from a server that has torch loaded. Every call gets a process group
of exactly its size, so device meshes of any shape work; a call costs 20 to 150 ms, a new pool 2 to 3 s. A deadline
kills the pool (its own processes only) and says where each rank stood; the next call starts a fresh one.

`fn` is a module-level function; arguments and results are pickled, so they are made of built-in types and tensors.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

LARGEST = 8
CALLS = 40
"""Calls after which the workers are replaced: every process group leaves threads behind that wake up for ever."""
GRACE = 3.0
"""Seconds that the other ranks get to fail in their own words once one rank has failed."""


class RankError(AssertionError):
    """A rank raised or did not answer in time; the message has what each of them says, the first to fail first."""


def _load(path: str, name: str) -> Callable[..., Any]:
    """A module-level function by file and name: under importlib mode a test module has no name to import it by."""
    module = sys.modules.get(path)
    if module is None:
        spec = importlib.util.spec_from_file_location(path, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name)


def _serve(rank: int, pipe: Connection, stacks: str, path: list[str]) -> None:
    torch.set_num_threads(1)
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A gloo rank that returns at once may close its connections before the others have accepted them, and fail these.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with open(stacks, "w") as dump:
        faulthandler.register(signal.SIGUSR1, dump)
        while True:
            try:
                (file, name), size, store, args = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                shared = dist.FileStore(store, size) if size > 1 else dist.HashStore()
                dist.init_process_group("gloo", rank=rank, world_size=size, store=shared)
                torch.manual_seed(0)
                answer = pickle.dumps((True, _load(file, name)(rank, size, *args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
                # DTensor keeps what it derived from a mesh; an equal mesh of the next call has other process groups.
                _clear_sharding_prop_cache()
            pipe.send_bytes(answer)


def forkserver() -> Any:
    """The context whose processes are forked from one server, which has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    # Not torchtitan itself: it reads the command line as it is imported.
    slow = [
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint",
        "torch.nn.attention.varlen",
        "datasets",
        "numba",
        "tyro",
    ]
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", *slow])
    return context


class Pool:
    """Up to LARGEST worker processes, started when first needed."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.workers: list[tuple[Any, Connection, Path]] = []
        self.calls = 0

    def _start(self, size: int) -> None:
        context = forkserver()
        path = [str(Path(__file__).parent), *sys.path]
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            stacks = Path(self.folder.name) / f"stacks-{time.monotonic_ns()}"
            args = (len(self.workers), theirs, str(stacks), path)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours, stacks))

    def stop(self) -> None:
        """End the worker processes; the next call starts new ones."""
        for process, pipe, _ in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []

    def run(self, fn: Callable[..., Any], size: int, *args: Any, timeout: float = 90) -> list[Any]:
        """The results of `fn(rank, size, *args)` on `size` ranks.

        Raises RankError, with the traceback of every rank that raised and the stacks of those that are not back after
        `timeout` seconds.
        """
        assert 1 <= size <= LARGEST
        if self.calls % CALLS == 0:
            self.stop()
        self._start(size)
        self.calls += 1
        store = os.path.join(self.folder.name, f"store-{self.calls}")
        where = (str(Path(sys.modules[fn.__module__].__file__ or "").resolve()), fn.__qualname__)
        for _, pipe, _ in self.workers[:size]:
            pipe.send_bytes(pickle.dumps((where, size, store, args)))

        results: dict[int, Any] = {}
        told: dict[str, list[int]] = {}
        pending: dict[Any, int] = {pipe: rank for rank, (_, pipe, _) in enumerate(self.workers[:size])}
        deadline = time.monotonic() + timeout
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    good, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    good, results[rank] = False, f"the process died, exit code {self.workers[rank][0].exitcode}\n"
                if not good:
                    told.setdefault(results[rank], []).append(rank)
                    deadline = min(deadline, time.monotonic() + GRACE)
        reason = "waited for the failed rank" if told else f"did not answer within {timeout} s"
        for rank in sorted(pending.values()):
            told.setdefault(f"{reason}; its stacks:\n{self._stacks(rank)}", []).append(rank)
        if told:
            # Ranks that failed apart count their process groups apart, and would wait for each other in the next call.
            self.stop()
            raise RankError("\n".join(f"rank {ranks} of {size}: {text}" for text, ranks in told.items()))
        return [results[rank] for rank in range(size)]

    def _stacks(self, rank: int) -> str:
        """Where the threads of a rank stand: it writes its own stacks when it gets the signal, busy or not."""
        process, _, stacks = self.workers[rank]
        if not process.is_alive():
            return f"(the process died, exit code {process.exitcode})\n"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return stacks.read_text()


POOL = Pool()
atexit.register(POOL.stop)
run = POOL.run
