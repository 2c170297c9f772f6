"""The command `plan`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..tools.flags import STDOUT, ConfigFile, JsonFile, check_config, check_file, number_of_ranks, write_json
from ..tools.isolated_process import in_isolated_process

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.rank_memory import Run


@dataclass
class Plan:
    """Show the exact memory of every rank of a run, and whether AdamMini is worth it; needs no GPU.

    Needs no weights either: torchtitan builds the model on the meta device, one rank of every pipeline stage; all other
    ranks follow by arithmetic. Exits with status 1 and a message if the run could not start. The plan compares AdamMini
    with [optimizer.adam_mini] to AdamW, whichever optimizer the configuration names. Takes any torchtitan --section.key
    value as well; the configuration may also be given as --job.config_file X or CONFIG_FILE=X, the number of ranks as
    NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: int | None = None
    """Number of ranks of the run."""

    json: JsonFile = None
    """Print JSON instead of the tables; with a file name, write it there and print the tables. Its keys:
    memory/facts.py."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        ngpu = self._checked()
        run: Run = in_isolated_process(_read_run, arguments, ngpu)
        from .facts import facts
        from .plan_tables import show

        plan = {"config": self.config, **facts(run)}
        if self.json:
            write_json(self.json, plan)
        if self.json != STDOUT:
            show(plan, console)

    def _checked(self) -> int:
        """The number of ranks; raises ValueError for invalid flags."""
        check_config(self.config)
        check_file("--json", self.json)
        return number_of_ranks(self.ngpu)


def _read_run(arguments: list[str], ngpu: int, sequence: bool = True) -> Run:
    """A `Run`, with an estimate of the memory of one more `sequence`, which takes most of the time.

    Needs a process of its own: it redirects standard output.
    """
    from ..offline.build import configured
    from ..offline.stages import run_of
    from .activations import sequence_bytes

    os.dup2(2, 1)
    config = configured(arguments, ngpu)
    run = run_of(config, ngpu)
    if not sequence:
        return run
    mixed = ngpu == 1 or run.meshes["dense"]["fsdp"] > 1
    return replace(run, sequence=sequence_bytes(config, mixed=mixed))
