"""A short AdamW run of a configuration with torchtitan's own trainer, for its checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tools.signals import sigterm_as_exit
from ..tools.trainer import end, errors_in, torchrun

if TYPE_CHECKING:
    from rich.console import Console

RUN = "run"
"""The name of its folder."""


def check_out(out: Path | None) -> None:
    """Raise ValueError if a folder contains a run already."""
    if out is not None and (out / RUN).exists():
        raise ValueError(f"{out / RUN} exists, and torchtitan would resume from its checkpoints: remove it")


@contextmanager
def short_run(arguments: list[str], steps: int, ranks: int, out: Path | None, console: Console) -> Iterator[Path]:
    """The checkpoint after the first `steps` steps of a configuration with AdamW, with the schedule of the full run.

    Args:
        arguments: torchtitan's command line, with `--job.config_file X` and the flags of `settings_of`.
        steps: number of steps; if the configuration has fewer, the schedule is extended.
        ranks: number of ranks.
        out: a folder in which the run and its log are kept; if None they are removed when the context ends.
        console: shows that it trains, and where the log is.

    Raises:
        ValueError: the run failed; the message has the reason and the log, which is then kept.
    """
    with sigterm_as_exit():
        folder = Path(tempfile.mkdtemp(prefix="titan-adam-mini-inspect-")) if out is None else out / RUN
        if out is not None:
            folder.mkdir()  # must be new, because it is removed if the run is interrupted
        try:
            with console.status(f"training {steps} steps with AdamW; its log is {folder / 'log'}"):
                _train([*arguments, "--job.dump_folder", str(folder)], ranks, folder / "log")
        except (KeyboardInterrupt, SystemExit):
            shutil.rmtree(folder)
            raise
        try:
            yield folder / "checkpoint" / f"step-{steps}"
        finally:
            if out is None:
                shutil.rmtree(folder)


def settings_of(config: Any, steps: int) -> list[str]:
    """The flags in which the short run differs from torchtitan's job configuration `config`."""
    settings = ["--optimizer.name", "AdamW", "--training.steps", str(steps), "--validation.no-enable"]
    # Beyond the end of its decay a linear schedule continues below zero.
    total = max(steps, config.lr_scheduler.total_steps or config.training.steps)
    settings += ["--lr_scheduler.total_steps", str(total)]
    settings += ["--checkpoint.enable", "--checkpoint.folder", "checkpoint", "--checkpoint.interval", str(steps)]
    settings += ["--checkpoint.no-last_save_model_only", "--checkpoint.no-last_save_in_hf", "--checkpoint.no-load_only"]
    if not config.experimental.custom_import:  # without an accelerator torchtitan needs it, and TITAN_ADAM_MINI_CPU=1
        settings += ["--experimental.custom_import", "titan_adam_mini.titan"]
    return settings


def _train(arguments: list[str], ranks: int, log: Path) -> None:
    """Run torchrun with its output in `log`. Raises ValueError if it fails; stops it if this process is interrupted."""
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*torchrun(ranks, "--log-dir", str(log.parent / "ranks")), *arguments],
            env={**os.environ, "TITAN_ADAM_MINI_CPU": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait()
        finally:
            end(process)
    if status:
        lines = log.read_text(errors="replace").splitlines()
        reason = (errors_in(lines) or lines[-1:] or ["it printed nothing"])[0]  # the first error caused the others
        raise ValueError(f"the AdamW run ended with status {status}: {reason} (its log is {log})")
