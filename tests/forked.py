"""Runs of torchtitan's trainer whose ranks are forked from a server that has everything imported: 10 s less each.

Same program, arguments and log as `launch/run_train.sh`, without torchrun: the first rank that fails takes the
others along, as torchrun's agent would have it. `python` runs other programs in the same way.
"""

import os
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from ranks import POOL, forkserver

from titan_adam_mini.compare.training import FEATURES, LOCK, LOG, Training
from titan_adam_mini.tools.trainer import Run, RunFailed, arguments

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train_configs" / "debug_model.toml"
SEQ_LEN, GLOBAL_BATCH, STEPS = 64, 4, 12
HALF = STEPS // 2
TP = {"parallelism.tensor_parallel_degree": 2}
WHOLE = {"checkpoint.interval": HALF, "checkpoint.last_save_model_only": False}
"""A checkpoint with everything half way, and another at the end."""

Hook = tuple[str, str, tuple[Any, ...]]
"""(file, name, arguments) of a function that every rank calls before the trainer starts, with its rank first."""


def _enter(env: dict[str, str], path: list[str], log: str) -> None:
    """Make a forked process look like one that was started: environment, modules, output."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.path[:] = path


def _python(program: str, env: dict[str, str], path: list[str], log: str) -> None:
    _enter(env, path, log)
    sys.argv = ["-c"]
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def python(programs: Sequence[str], folder: Path, timeout: float = 240) -> list[tuple[int | None, str]]:
    """What `python -c PROGRAM` would have ended with and printed, all programs at once; None for one that hangs.

    What differs: the interpreter is not taken down at the end.

    Each program has its number in RANK and LOCAL_RANK, and a port that is free for all of them in MASTER_PORT.
    """
    common = _meeting(len(programs))
    logs, processes = [folder / f"python-{rank}.log" for rank in range(len(programs))], []
    for rank, (program, log) in enumerate(zip(programs, logs, strict=True)):
        log.unlink(missing_ok=True)
        given = (program, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, list(sys.path), str(log))
        processes.append(forkserver().Process(target=_python, args=given, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def _meeting(ranks: int) -> dict[str, str]:
    """The environment in which so many ranks on this machine meet; torchrun would set it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return env | {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}


def _rank(rank: int, env: dict[str, str], path: list[str], argv: list[str], log: str, hook: Hook | None) -> None:
    _enter({**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, path, log)
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
    patience: float = 0,
) -> Run:
    """The finished run `name`.

    Args:
        name: its log is `out/name.log`, its dump folder `out/name`.
        settings: the trainer's settings by name, such as `{"training.steps": 10, "checkpoint.enable": True}`.
        ranks: number of processes.
        config: TOML file.
        time_limit: seconds after which the run is stopped and counts as failed.
        shown: the rank whose log is read.
        hook, given: a module-level function that every rank calls before anything else, as `hook(rank, *given)`.
        patience: seconds that the others have to end by themselves once a rank has ended with an error.

    Raises:
        RunFailed: with the exit codes and the log, if a rank ended with an error or time ran out.
    """
    out.mkdir(parents=True, exist_ok=True)
    argv = ["--job.config_file", str(config), *arguments({"job.dump_folder": out / name, **settings})]
    logs = [out / f"{name}.log" if rank == shown else out / f"{name}.rank{rank}.log" for rank in range(ranks)]
    called = None if hook is None else (str(Path(hook.__code__.co_filename).resolve()), hook.__name__, given)
    features = {"TITAN_ADAM_MINI_CPU": "1", "TITAN_ADAM_MINI_SIGNALS": "1"}
    ended = run_ranks(argv, logs, features, hook=called, time_limit=time_limit, patience=patience)
    if any(code != 0 for code in ended):
        message = "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
        raise RunFailed(f"{name} ended with {ended} (None: still running)\n{message}")
    return Run.load(logs[shown], ranks)


def run_ranks(
    argv: Sequence[str],
    logs: Sequence[Path],
    env: Mapping[str, str],
    *,
    hook: Hook | None = None,
    time_limit: float = 240,
    patience: float = 0,
) -> list[int | str | None]:
    """Run torchtitan's trainer with one rank per log; returns exit codes, names of signals, None for one that hangs."""
    POOL.stop()  # its idle ranks would share the cores
    env = {**_meeting(len(logs)), **env}
    processes = []
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        given = (rank, env, list(sys.path), list(argv), str(log), hook)
        processes.append(forkserver().Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + time_limit
    waiting = {process.sentinel: process for process in processes}
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for sentinel in ready:
            waiting.pop(sentinel).join()
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + patience)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [signal.Signals(-code).name if code and code < 0 else code for code in codes]


class ForkedTraining(Training):
    """A trainer of `compare` that has exited once this exists, its ranks forked; it holds no lock."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        ranks: int,
        loss_rank: int,
        variables: Mapping[str, str],
        **_: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.variables, self.pid, self.adopted = folder, variables, 0, False
        self.step, self.loss, self.resumed_step = 0, "", 0
        self._log_position, self._process, self._lock = 0, None, open(folder / LOCK, "a+")  # noqa: SIM115
        logs = [folder / (LOG if rank == loss_rank else f"rank{rank}.log") for rank in range(ranks)]
        codes = run_ranks([*arguments, "--job.dump_folder", str(folder)], logs, {**variables, **FEATURES})
        assert codes == [0] * ranks, (folder / LOG).read_text()[-3000:]

    def _alive(self) -> bool:
        return False


class Trainer:
    """Starts runs that share settings, seed checkpoint and data; what differs is the mesh."""

    def __init__(self, out: Path, corpus: Path, flavor: str = "adam_mini_debug", seed: int = 0) -> None:
        self.out, self.corpus = out, corpus
        self.common = {
            "model.flavor": flavor,
            "model.hf_assets_path": corpus / "tokenizer",
            "training.seq_len": SEQ_LEN,
            "training.steps": STEPS,
            "lr_scheduler.total_steps": STEPS,
            "checkpoint.enable": True,
        }
        first = {"checkpoint.create_seed_checkpoint": True, "debug.seed": seed}
        self("seed", ranks=1, start={}, **first)

    def __call__(
        self,
        name: str,
        *,
        ranks: int,
        data: int = 1,
        start: dict[str, Any] | None = None,
        shown: int = 0,
        hook: Callable[..., None] | None = None,
        given: tuple[Any, ...] = (),
        patience: float = 0,
        **mesh: Any,
    ) -> Run:
        """The finished run: `data` ranks of it see different documents, rank `shown` reports the losses."""
        settings = {
            **self.common,
            "training.dataset_path": self.corpus / f"train-{data}",
            "training.local_batch_size": GLOBAL_BATCH // data,
            **({"checkpoint.initial_load_path": self.checkpoint("seed", 0)} if start is None else start),
            **mesh,
        }
        acts = {"shown": shown, "hook": hook, "given": given, "patience": patience}
        return train(name, settings, ranks=ranks, out=self.out, config=CONFIG, **acts)

    def checkpoint(self, name: str, step: int) -> Path:
        return self.out / name / "checkpoint" / f"step-{step}"

    def resume(self, name: str, **mesh: Any) -> Run:
        """A run on two ranks that goes on from the middle of the run `name`."""
        shutil.copytree(self.checkpoint(name, HALF), self.checkpoint(f"{name}_resumed", HALF))
        return self(f"{name}_resumed", ranks=2, data=2, start={}, **mesh)


def difference(run: Any, other: Any, first: int = 1, last: int = STEPS) -> float:
    """The largest difference between the losses of two runs, from step `first` to `last`, all of which `run` did."""
    assert list(run.losses) == list(range(first, last + 1))
    largest = max(abs(run.losses[step] - other.losses[step]) for step in run.losses)
    print(f"{run.log.stem} and {other.log.stem}: losses differ by at most {largest:.1e}")
    return largest


def said(run: Any, pattern: str) -> str:
    found = re.search(pattern, "\n".join(run.lines))
    assert found is not None, f"{pattern} is not in {run.log}"
    return found[1]
