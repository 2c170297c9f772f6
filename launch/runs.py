"""Runs torchtitan's trainer through launch/run_train.sh, and reads its log while it runs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_adam_mini.tools.trainer import Run, RunFailed, arguments, end, errors_in

__all__ = ["ROOT", "Run", "RunFailed", "arguments", "optimizer_bytes", "train"]

ROOT = Path(__file__).resolve().parent.parent


def train(
    name: str,
    settings: dict[str, Any],
    *,
    ranks: int,
    out: Path,
    config: Path,
    env: dict[str, str] | None = None,
    on_step: Callable[[Run, int], None] | None = None,
    time_limit: float = 900,
) -> Run:
    """Run torchtitan's trainer through launch/run_train.sh and wait for it.

    Args:
        name: the run's name: its log is `out/name.log`, its dump folder `out/name`.
        settings: the trainer's settings by name, such as `{"training.steps": 10, "checkpoint.enable": True}`.
        ranks: number of processes.
        out: folder of all runs.
        config: TOML file.
        env: more environment variables.
        on_step: called with the run and the step whenever a training step is reported.
        time_limit: seconds after which the run is stopped and has failed.

    Raises:
        RunFailed: it ended with an error, took too long, or reported no step although `on_step` is given.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = Run(ranks, out / f"{name}.log")
    script = ROOT / "launch" / "run_train.sh"
    command = ["bash", str(script), *arguments({"job.dump_folder": out / name, **settings})]
    # The Python that runs this file, whatever virtual environment the user has active.
    environment = {**os.environ, "PYTHON": sys.executable, "NGPU": str(ranks), "LOG_RANK": "0"}
    environment |= {"CONFIG_FILE": str(config), **(env or {})}
    environment.pop("COMM_MODE", None)
    late = threading.Event()
    with open(run.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def stop() -> None:
            late.set()
            end(process)

        timer = threading.Timer(time_limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                step = run.read(line)
                if step is not None and on_step is not None:
                    on_step(run, step)
            status = process.wait()
        finally:
            timer.cancel()
            end(process)  # an interrupt or an error here must not leave ranks behind
    if late.is_set():
        raise RunFailed(f"{name} was still running after {time_limit:.0f} seconds and was stopped; log: {run.log}")
    if status != 0:
        reason = "\n".join(dict.fromkeys(errors_in(run.lines)) or run.lines[-12:])
        raise RunFailed(f"{name} ended with status {status}.\n{reason}\nlog: {run.log}")
    if on_step is not None and not run.losses:
        raise RunFailed(f"{name} ended without reporting a single step; log: {run.log}")
    return run


def optimizer_bytes(checkpoint: Path) -> tuple[int, int, int]:
    """From a checkpoint's metadata: total bytes of optimizer state, bytes of second moments in it, and the number of
    parameters."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    total = seconds = parameters = 0
    for name, entry in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
        if not name.startswith("optimizer.state.") or not isinstance(entry, TensorStorageMetadata):
            continue
        size = entry.size.numel() * entry.properties.dtype.itemsize
        total += size
        seconds += size * name.endswith(".exp_avg_sq")
        parameters += entry.size.numel() * name.endswith(".exp_avg")
    if not parameters:
        raise RunFailed(f"The checkpoint {checkpoint} has no optimizer state.")
    return total, seconds, parameters
