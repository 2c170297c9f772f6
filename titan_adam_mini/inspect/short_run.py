"""A short AdamW run of a configuration by torchtitan's own trainer, for its checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tools.signals import ending_in_order
from ..tools.trainer import end, errors_in, torchrun

if TYPE_CHECKING:
    from rich.console import Console

RUN = "run"
"""Its folder's name."""


def check_out(out: Path | None) -> None:
    """Raise ValueError if a folder holds a run already."""
    if out is not None and (out / RUN).exists():
        raise ValueError(f"{out / RUN} exists, and torchtitan would go on from its checkpoints: remove it")


@contextmanager
def short_run(arguments: list[str], steps: int, ranks: int, out: Path | None, console: Console) -> Iterator[Path]:
    """The checkpoint after the first `steps` steps of a configuration with AdamW, the schedule as in the whole run.

    Args:
        arguments: torchtitan's command line, `--job.config_file X` and what `settings_of` gives among it.
        steps: how many; if more than the configuration has, the schedule is longer too.
        ranks: number of them.
        out: a folder for the run and its log, which stay; if None they are removed once the context ends.
        console: says that it trains, and where the log is.

    Raises:
        ValueError: the run failed, with its reason and the log, which then stays.
    """
    with ending_in_order():
        folder = Path(tempfile.mkdtemp(prefix="titan-adam-mini-inspect-")) if out is None else out / RUN
        if out is not None:
            folder.mkdir()  # no other's: it is removed if the run is stopped
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
    """What the short run does in another way than torchtitan's job configuration `config`."""
    settings = ["--optimizer.name", "AdamW", "--training.steps", str(steps), "--validation.no-enable"]
    # Past the end of its decay a linear schedule goes on below zero.
    total = max(steps, config.lr_scheduler.total_steps or config.training.steps)
    settings += ["--lr_scheduler.total_steps", str(total)]
    settings += ["--checkpoint.enable", "--checkpoint.folder", "checkpoint", "--checkpoint.interval", str(steps)]
    settings += ["--checkpoint.no-last_save_model_only", "--checkpoint.no-last_save_in_hf", "--checkpoint.no-load_only"]
    if not config.experimental.custom_import:  # without an accelerator torchtitan needs it, and TITAN_ADAM_MINI_CPU=1
        settings += ["--experimental.custom_import", "titan_adam_mini.titan"]
    return settings


def _train(arguments: list[str], ranks: int, log: Path) -> None:
    """torchrun, whose output goes into `log`. Raises ValueError if it fails; ends it if anything happens here."""
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
        reason = (errors_in(lines) or lines[-1:] or ["it said nothing"])[0]  # the first is what stopped the others
        raise ValueError(f"the AdamW run ended with status {status}: {reason} (its log is {log})")
