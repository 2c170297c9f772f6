"""The command `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..tools.isolated_process import in_isolated_process

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Convert:
    """Convert a checkpoint of torchtitan between AdamW and AdamMini, into a new folder.

    The source is not changed. Momentum (in the configured dtype) and step are copied; a block's second moment becomes
    the mean of AdamW's over the block, or is spread over it. Model, scheduler, data position and train state are copied
    too. Needs the configuration of the run: --job.config_file X, followed by any torchtitan --section.key value; or
    CONFIG_FILE=X.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC/step-N")]
    """The checkpoint, such as outputs/checkpoint/step-1000."""

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST/step-N")]
    """The new checkpoint; must not exist."""

    to: Literal["adam_mini", "adamw"]
    """The optimizer to convert to."""

    lr: float | None = None
    """A new base learning rate; the position in the schedule is kept."""

    dry_run: bool = False
    """Check everything and print what would be done, without writing."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        if self.target.exists():
            raise ValueError(f"{self.target} exists; nothing is overwritten: remove it, or name another folder")
        if "--job.config_file" not in arguments:
            raise ValueError("the model is not known: give --job.config_file X, or set CONFIG_FILE=X")
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Table

        from ..checkpoint.stored import Stored
        from .convert import Conversion, convert

        stored = Stored(self.source)
        blocks, group, momentum_dtype = in_isolated_process(_target, arguments, self.to)
        conversion = Conversion(stored, self.to, blocks, group, self.lr, momentum_dtype)
        per_block = sum(layout.second_moments for layout in blocks.values())
        per_element = sum(stored.tensors[f"optimizer.state.{name}.exp_avg"].size.numel() for name in blocks)
        old, new = (per_element, per_block) if self.to == "adam_mini" else (per_block, per_element)
        console.print(
            f"{self.source}: {stored.optimizer()}'s state of {len(blocks)} parameters, {stored.size:,} bytes; "
            f"second moments {old:,} -> {new:,}",
            soft_wrap=True,
        )
        if self.dry_run:
            console.print(f"Dry run: nothing was written to {self.target}.", soft_wrap=True)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("converting", total=stored.size)
            rows = convert(conversion, self.target, lambda count: progress.advance(task, count))
        table = Table("role", "before", "after", title="RMS of the last update, without the learning rate")
        for role, before, after in rows:
            table.add_row(role, f"{before:.4f}", f"{after:.4f}")
        console.print(table)
        name = {"adam_mini": "AdamMini --experimental.custom_import titan_adam_mini.titan", "adamw": "AdamW"}[self.to]
        console.print(
            f"Written: {self.target}. Resume from it, in a dump folder without checkpoints, with\n"
            f"--optimizer.name {name} --checkpoint.enable --checkpoint.initial_load_path {self.target} "
            "--checkpoint.no_initial_load_model_only",
            soft_wrap=True,
            highlight=False,
        )


def _target(arguments: list[str], to: str) -> Any:
    from ..offline.build import configured
    from ..offline.full_model import target_of

    return target_of(configured(arguments, ngpu=1), to)
