"""A pool of gloo ranks, started once per test run: `run(fn, world_size, *args)` calls `fn(rank, world_size, *args)`.

Workers are plain processes on loopback. Every call gets a process group of exactly its size; a deadline kills the
pool (its own processes only) and says where each rank stood.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LARGEST = 8


class RankError(AssertionError):
    """A rank raised, or none answered in time; the message holds the traceback of every rank that has one."""


def _load(path: str, name: str) -> Callable[..., Any]:
    """A module-level function by file and name: test modules cannot be imported by name."""
    module = sys.modules.get(path)
    if module is None:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path] = module
        spec.loader.exec_module(module)
    return getattr(module, name)


def _serve(rank: int, pipe: Connection, stacks: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    with open(stacks, "w") as dump:
        while True:
            try:
                (path, name), size, store, args, timeout = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(timeout, file=dump)
            try:
                dist.init_process_group(
                    "gloo", rank=rank, world_size=size, store=dist.FileStore(store, size) if size > 1 else dist.HashStore()
                )
                answer = True, _load(path, name)(rank, size, *args)
            except BaseException:
                answer = False, traceback.format_exc()
            finally:
                faulthandler.cancel_dump_traceback_later()
                if dist.is_initialized():
                    dist.destroy_process_group()
            pipe.send(answer)


class Pool:
    """Up to LARGEST worker processes, started when first needed."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.workers: list[tuple[Any, Connection, Path]] = []
        self.calls = 0

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            stacks = Path(self.folder.name) / f"stacks-{time.monotonic_ns()}"
            process = context.Process(target=_serve, args=(len(self.workers), theirs, str(stacks)), daemon=True)
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
        """The results of `fn(rank, size, *args)` on `size` ranks. Raises RankError if any raises or is late."""
        assert 1 <= size <= LARGEST
        self._start(size)
        self.calls += 1
        store = os.path.join(self.folder.name, f"store-{self.calls}")
        where = (str(Path(sys.modules[fn.__module__].__file__ or "").resolve()), fn.__qualname__)
        for _, pipe, _ in self.workers[:size]:
            pipe.send((where, size, store, args, timeout))
        answers: dict[int, Any] = {}
        pending = {pipe: rank for rank, (_, pipe, _) in enumerate(self.workers[:size])}
        deadline = time.monotonic() + timeout
        failed_at = None
        while pending:
            # Once a rank has failed the others wait for it in vain: give them a moment to fail in their own words.
            limit = deadline if failed_at is None else min(deadline, failed_at + 3)
            ready = wait(list(pending), max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0] and failed_at is None:
                    failed_at = time.monotonic()
        late = sorted(pending.values())
        told = [f"rank {rank}:\n{text}" for rank, (good, text) in sorted(answers.items()) if not good]
        if late:
            time.sleep(0.2)
            stacks = [self.workers[rank][2].read_text() for rank in late]
            self.stop()
            told += [f"rank {rank} did not answer within {timeout} s\n{text}" for rank, text in zip(late, stacks, strict=True)]
        if told:
            raise RankError("\n".join(told))
        return [answers[rank][1] for rank in range(size)]


POOL = Pool()
atexit.register(POOL.stop)
run = POOL.run
