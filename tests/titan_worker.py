"""Processes forked from a server that has torchtitan loaded, with this package's part of it: 0.1 s each in place of 10.

`Forks` takes the place of the process pool in `titan_adam_mini.tools.isolated_process`, where a command is tested in
the test's own process; `call(function, *args)` is for a test's own functions. Functions and arguments are pickled, so
functions are module-level. A process sees the environment that its server had when it started, with the first call.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from ranks import forkserver

CONFIG = Path(__file__).resolve().parents[1] / "train_configs" / "debug_model.toml"
LOADED = (
    *(f"titan_adam_mini.offline.{name}" for name in ("stages", "full_model")),
    *(f"titan_adam_mini.{name}" for name in ("bench.shards", "compare.configurations", "memory.simulate")),
    "titan_adam_mini.memory.activations",
)
TIMEOUT = 600.0
"""Seconds that a call may take before its process is killed: much, since machines of tests are busy."""


def _serve(pipe: Connection, path: list[str]) -> None:
    """Fork a process for every connection that comes through the pipe."""
    sys.path[:] = path
    sys.argv[1:] = []  # torchtitan's parser takes the command line of the process that imports it for its default
    for name in LOADED:
        importlib.import_module(name)
    from titan_adam_mini.offline.build import configured

    configured(["--job.config_file", str(CONFIG)], 1)  # the first configuration that is parsed takes longest
    gc.freeze()
    while True:
        try:
            handle = recv_handle(pipe)
        except EOFError:
            return
        # Not os.fork: multiprocessing also reaps those that have ended.
        multiprocessing.get_context("fork").Process(target=_work, args=(handle,), daemon=True).start()
        os.close(handle)


def _work(handle: int) -> None:
    """Answer one call after another until the other side hangs up."""
    connection = Connection(handle)
    connection.send(os.getpid())
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:  # SystemExit among them, with which torchtitan's parser refuses
            error.__notes__ = [*getattr(error, "__notes__", []), traceback.format_exc()]
            answer = pickle.dumps((False, error))
        connection.send_bytes(answer)


class _Server:
    """Started with the first call, ended with the tests."""

    def __init__(self) -> None:
        self.pipe: Connection | None = None

    def fork(self) -> Connection:
        """A connection to a new process."""
        if self.pipe is None:
            self.pipe, theirs = multiprocessing.Pipe()
            self.process = forkserver().Process(target=_serve, args=(theirs, list(sys.path)))
            self.process.start()
            theirs.close()
            atexit.register(self.stop)
        ours, theirs = multiprocessing.Pipe()
        send_handle(self.pipe, theirs.fileno(), self.process.pid)
        theirs.close()
        return ours

    def stop(self) -> None:
        """Its last connection closed, the server ends by itself."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
            self.process.join()


_server = _Server()


class Forks:
    """One such process, with what `titan_adam_mini.tools.isolated_process` uses of a `ProcessPoolExecutor`."""

    def __init__(self, *_: Any) -> None:
        self.connection = _server.fork()
        self.pid: int | None = None

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Its result, or what it raised there; TimeoutError if it does not come."""
        future: Future[Any] = Future()
        try:
            self.connection.send((function, args))
            if self.pid is None:
                self.pid = self._received()
            good, result = self._received()
        except (EOFError, ConnectionError):
            raise BrokenProcessPool("the process died") from None
        if good:
            future.set_result(result)
        else:
            future.set_exception(result)
        return future

    def _received(self) -> Any:
        if self.connection.poll(TIMEOUT):
            return self.connection.recv()
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        raise TimeoutError(f"no answer from process {self.pid} within {TIMEOUT} s")


def call(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a process of its own."""
    with Forks() as pool:
        return pool.submit(function, *args).result()
