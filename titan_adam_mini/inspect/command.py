"""The command `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tools.figures import require_matplotlib
from ..tools.flags import (
    STDOUT,
    ConfigFile,
    JsonFile,
    check_config,
    check_file,
    check_folder,
    ranks_of_a_run,
    write_json,
)
from ..tools.isolated_process import in_isolated_process
from .short_run import check_out, settings_of, short_run

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint.stored import Stored
    from ..partition import Partition

PICTURE = "heat_map.png"


@dataclass
class Inspect:
    """Show where one second moment per block loses information, and which blocks would lose less.

    Reads the second moments of an AdamW checkpoint of torchtitan (--checkpoint), or of a short AdamW run of the
    configuration (--steps), a window of one tensor at a time; needs no GPU and no weights. How even they are within
    blocks is given as a signal-to-noise ratio: above 1 a block's mean represents its elements well. The line printed
    at the end belongs into [optimizer.adam_mini]. Takes any torchtitan --section.key value as well; the configuration
    may also be given as --job.config_file X or CONFIG_FILE=X.
    """

    config: ConfigFile
    """torchtitan's configuration of the run."""

    checkpoint: Path | None = None
    """A checkpoint with AdamW's state, such as outputs/checkpoint/step-1000."""

    steps: int | None = None
    """Without a checkpoint: train the configuration with AdamW for this many steps, and inspect the result."""

    ngpu: int | None = None
    """Number of ranks of this short run; NGPU, or one, if not given."""

    out: Path | None = None
    """A folder for the heat map (heat_map.png), and for the short run, which is otherwise removed."""

    json: JsonFile = None
    """Print JSON instead of the table; with a file name, write it there and print the table. Its keys:
    inspect/findings.py."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        self._check()
        from ..checkpoint.stored import Stored

        stored = None if self.checkpoint is None else Stored(self.checkpoint)
        *found, settings = in_isolated_process(_read, arguments, self.steps)  # before a run that may take hours
        if self.out is not None:
            self.out.mkdir(exist_ok=True)
        if stored is not None:
            self._inspect(stored, str(self.checkpoint), console, *found)
            return
        assert self.steps is not None
        with short_run([*arguments, *settings], self.steps, ranks_of_a_run(self.ngpu), self.out, console) as path:
            source = str(path) if self.out else f"a run of {self.steps} steps"
            self._inspect(Stored(path), source, console, *found)

    def _check(self) -> None:
        """Raise ValueError for invalid flags."""
        check_config(self.config)
        check_file("--json", self.json)
        check_folder("--out", self.out)
        if (self.checkpoint is None) == (self.steps is None):
            raise ValueError("give one source: --checkpoint outputs/checkpoint/step-N, or --steps N to train")
        if self.checkpoint is not None and self.ngpu is not None:
            raise ValueError("--ngpu is for the run of --steps, and nothing is run with --checkpoint: omit it")
        if self.steps is not None:
            if self.steps < 1:
                raise ValueError(f"--steps must be 1 or more, not {self.steps}")
            check_out(self.out)
            ranks_of_a_run(self.ngpu)  # raises for an invalid number
        if self.out is not None:
            require_matplotlib()

    def _inspect(
        self,
        stored: Stored,
        source: str,
        console: Console,
        model: str,
        partition: Partition,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        from .findings import inspect
        from .heat_map import heat_map
        from .moments import stored_moments
        from .tables import show

        moments = stored_moments(stored, shapes)
        with _progress(console, len(moments)) as advance:
            inspection = inspect(moments, partition, on_parameter=lambda name: advance())
        if self.json:
            write_json(self.json, {"config": self.config, "model": model, "source": source, **inspection.facts()})
        if self.json != STDOUT:
            console.print(f"{model} ({self.config}), {source}", soft_wrap=True, highlight=False)
            show(inspection, console)
        if self.out is not None:
            heat_map(self.out / PICTURE, f"{model}, {source}", inspection)
            if self.json != STDOUT:
                console.print(f"Heat map: {self.out / PICTURE}", soft_wrap=True, highlight=False)


def _read(arguments: list[str], steps: int | None) -> Any:
    """Model, partition, shapes, and the settings in which a short run of `steps` differs from the configuration."""
    from ..offline.build import configured
    from ..offline.full_model import partition_of

    config = configured(arguments, ngpu=1)
    return *partition_of(config), [] if steps is None else settings_of(config, steps)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("parameters", total=total)
        yield lambda: progress.advance(task)
