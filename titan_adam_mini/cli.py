"""The command `titan-adam-mini`: its own flags, and any of torchtitan's as `--section.key value`.

torchtitan is imported in a child process only, which ends before the work begins: what a command needs of it is small,
and its imports take half a gigabyte.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .bench.command import Bench
from .checkpoint.convert import Conversion, convert
from .checkpoint.stored import Stored
from .child import in_child
from .compare.command import Compare
from .inspect.command import Inspect
from .memory.estimate import Estimate
from .memory.plan import Plan
from .memory.snapshot_command import SnapshotCommand


@dataclass
class Convert:
    """Convert a checkpoint of torchtitan between AdamW and AdamMini, into a new folder.

    The source is left as it is. Momentum (in the configuration's type) and step stay; a block's second moment becomes
    the mean of AdamW's over the block, or is spread over it. Model, scheduler, data position and train state come
    along. Needs the configuration of the run: --job.config_file X, and after it any of torchtitan's --section.key
    value; or CONFIG_FILE=X.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC/step-N")]
    """The checkpoint, such as outputs/checkpoint/step-1000."""

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST/step-N")]
    """The new one; must not exist."""

    to: Literal["adam_mini", "adamw"]
    """The optimizer that is to go on."""

    lr: float | None = None
    """A new base learning rate; where the schedule stands is kept."""

    dry_run: bool = False
    """Check everything and say what would be done."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        stored = Stored(self.source)
        if self.target.exists():
            raise ValueError(f"{self.target} exists; nothing is overwritten: remove it, or name another folder")
        if "--job.config_file" not in arguments:
            raise ValueError("the model is not known: give --job.config_file X, or set CONFIG_FILE=X")
        blocks, group, momentum_dtype = in_child(_target, arguments, self.to)
        conversion = Conversion(stored, self.to, blocks, group, self.lr, momentum_dtype)
        seconds = sum(one.second_moments for one in blocks.values())
        total = sum(stored.tensors[f"optimizer.state.{name}.exp_avg"].size.numel() for name in blocks)
        old, new = (total, seconds) if self.to == "adam_mini" else (seconds, total)
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
            f"Written: {self.target}. Go on from it, in a dump folder without checkpoints, with\n"
            f"--optimizer.name {name} --checkpoint.enable --checkpoint.initial_load_path {self.target} "
            "--checkpoint.no_initial_load_model_only",
            soft_wrap=True,
            highlight=False,
        )


def _target(arguments: list[str], to: str) -> Any:
    from .titan.target import read_target

    return read_target(arguments, to)


def _config_first(words: list[str]) -> tuple[list[str], list[str]]:
    """`--job.config_file X` (or the environment's CONFIG_FILE) for torchtitan, and the other words."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == "--job.config-file":
            taken = 1 if equals else 2
            value = value or "".join(words[place + 1 : place + 2])
            return ["--job.config_file", value], words[:place] + words[place + taken :]
    return (["--job.config_file", os.environ["CONFIG_FILE"]] if os.environ.get("CONFIG_FILE") else []), words


def _config_in_place(words: list[str]) -> tuple[list[str], list[str]]:
    """For a command with a CONFIG of its own: as `_config_first`, and the words with CONFIG in front, "" if none is.

    Were CONFIG left for the parser to find, the value of any of torchtitan's flags could be taken for it.
    """
    config, own = _config_first(words)
    for place, word in enumerate(own):
        if not word.startswith("-") and (place == 0 or word.endswith(".toml")):
            config, own = ["--job.config_file", word], own[:place] + own[place + 1 :]
            break
    return config, [*(config[1:] or [""]), *own]


COMMANDS = {
    "plan": Plan,
    "estimate": Estimate,
    "snapshot": SnapshotCommand,
    "convert": Convert,
    "inspect": Inspect,
    "bench": Bench,
    "compare": Compare,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (the process's own by default); status 1 and a sentence if it cannot be done."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        print("usage: titan-adam-mini COMMAND [own flags] [any of torchtitan's --section.key value]\n")
        for name, command in COMMANDS.items():
            print(f"  {name}: {(command.__doc__ or '').splitlines()[0]}")
        print("\nThe configuration is --job.config_file X or CONFIG_FILE=X. titan-adam-mini COMMAND --help says more.")
        sys.exit(0 if words in (["--help"], ["-h"]) else 2)
    taken = _config_in_place if "config" in COMMANDS[words[0]].__annotations__ else _config_first
    config, own = taken(words[1:])
    command, rest = tyro.cli(COMMANDS[words[0]], args=own, prog=f"titan-adam-mini {words[0]}", return_unknown_args=True)
    try:
        command(Console(), [*config, *rest])
    except (ValueError, OSError) as error:  # a full disk, a file that may not be read
        print(f"titan-adam-mini: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("titan-adam-mini: stopped; nothing was left half-written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
