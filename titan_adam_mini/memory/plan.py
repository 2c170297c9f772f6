"""The command `plan`: its flags, and the order of what is done."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..tools.flags import STDOUT, ConfigFile, JsonFile, check_config, check_file, number_of_ranks, write_json
from ..tools.isolated_process import in_isolated_process

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.holdings import Run


@dataclass
class Plan:
    """Say what every rank of a run will hold, exactly, and whether AdamMini is worth it; needs no GPU.

    Needs no weights either: torchtitan builds the model on the meta device, one rank of every pipeline stage; all other
    ranks follow by arithmetic. Exits with status 1 and a sentence if the run could not start. The plan is for AdamMini
    with [optimizer.adam_mini], whatever the optimizer's name, beside AdamW. Takes any of torchtitan's --section.key
    value besides; the configuration may also be given as --job.config_file X or CONFIG_FILE=X, the number of ranks as
    NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: int | None = None
    """Number of ranks of the run."""

    json: JsonFile = None
    """JSON in place of the tables; into a file, if one is named, beside them. For its keys see memory/facts.py."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        ngpu = self._checked()
        run: Run = in_isolated_process(_read_run, arguments, ngpu)
        from .facts import facts
        from .plan_tables import show

        told = {"config": self.config, **facts(run)}
        if self.json:
            write_json(self.json, told)
        if self.json != STDOUT:
            show(told, console)

    def _checked(self) -> int:
        """The number of ranks; ValueError for flags that cannot be served."""
        check_config(self.config)
        check_file("--json", self.json)
        return number_of_ranks(self.ngpu)


def _read_run(arguments: list[str], ngpu: int, sequence: bool = True) -> Run:
    """What a run holds, with an estimate of what one more `sequence` takes, which is most of the time.

    Takes the whole process. Nothing is written to standard output.
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
