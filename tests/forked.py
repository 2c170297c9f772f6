"""Runs of torchtitan's trainer whose ranks are forked from a server that has everything imported: 10 s less each.

Same program, arguments, log and result as `launch/runs.py`, without torchrun: the first rank that fails takes the
others along, as torchrun's agent would have it.
"""

import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from ranks import forkserver
from runs import Run, RunFailed, arguments

Hook = tuple[str, str, tuple[Any, ...]]
"""(file, name, arguments) of a function that every rank calls before the trainer starts, with its rank first."""


def _rank(rank: int, env: dict[str, str], path: list[str], argv: list[str], log: str, hook: Hook | None) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.path[:] = path
    sys.argv = ["torchtitan.train", *argv]
    if hook is not None:
        file, name, given = hook
        runpy.run_path(file)[name](rank, *given)
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


def train(
    name: str,
    settings: dict[str, Any],
    *,
    ranks: int,
    out: Path,
    config: Path,
    shown: int = 0,
    hook: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
    time_limit: float = 240,
) -> Run:
    """The finished run `name`; see `launch/runs.py: train` for the arguments.

    Args:
        shown: the rank whose log is read.
        hook, given: a module-level function that every rank calls before anything else, as `hook(rank, *given)`.

    Raises:
        RunFailed: with the exit codes and the log, if a rank ended with an error or time ran out.
    """
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    env |= {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    argv = ["--job.config_file", str(config), *arguments({"job.dump_folder": out / name, **settings})]
    logs = [out / f"{name}.log" if rank == shown else out / f"{name}.rank{rank}.log" for rank in range(ranks)]
    called = None if hook is None else (str(Path(hook.__code__.co_filename).resolve()), hook.__name__, given)
    processes = []
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        one = forkserver().Process(target=_rank, args=(rank, env, list(sys.path), argv, str(log), called), daemon=True)
        one.start()
        processes.append(one)
    deadline = time.monotonic() + time_limit
    waiting = {process.sentinel: process for process in processes}
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for sentinel in ready:
            waiting.pop(sentinel).join()
        if any(process.exitcode for process in processes):
            break
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    run = Run(ranks, logs[shown])
    for line in run.log.read_text(errors="replace").splitlines():
        run.read(line)
    if any(code != 0 for code in codes):
        ended = [signal.Signals(-code).name if code and code < 0 else code for code in codes]
        told = "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
        raise RunFailed(f"{name} ended with {ended} (None: still running)\n{told}")
    return run
