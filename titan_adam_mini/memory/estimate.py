"""The command `estimate`: the peak of a training step by category, AdamW beside AdamMini, and what fits a budget."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..tools.flags import STDOUT, ConfigFile, JsonFile, check_config, check_file, write_json
from ..tools.isolated_process import isolated_process
from ..tools.versions import version
from .fit import LIMITS
from .picture import GIB

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Estimate:
    """Simulate the peak memory of a training step by category, AdamW beside AdamMini, without hardware.

    Takes any torchtitan --section.key value as well; the configuration may also be given as --job.config_file X or
    CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: str = ""
    """Numbers of ranks, such as 8,64,512."""

    rank: int | None = None
    """The rank to simulate. If not given, the first rank of every pipeline stage is simulated and the largest shown."""

    fit: str = ""
    """Memory of a GPU, such as 80GiB: find the largest local batch, the longest sequence and the fewest GPUs that fit
    it with AdamW and with AdamMini, for each mode of activation checkpointing."""

    reserve: str = "6GiB"
    """What --fit leaves free for the CUDA context, NCCL and fragmentation."""

    vary: str = ",".join(LIMITS)
    """What --fit searches for."""

    json: JsonFile = None
    """Print JSON instead of the tables, every size in bytes; with a file name, write it there and print the tables."""

    plot: Path | None = None
    """Write a picture: stacked bars of AdamW and AdamMini for every number of ranks."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        rank_counts, limit = self._checked()
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from .peak_tables import CAVEAT, as_json, draw, show
        from .peaks import fits, simulated

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress, isolated_process() as call:
            runs = []
            for ngpu in rank_counts:
                task = progress.add_task(f"simulating {ngpu:,} ranks", total=None)
                runs.append(simulated(call, arguments, ngpu, self.rank))
                progress.remove_task(task)
            found = fits(runs[-1], arguments, self._varied(), limit, self.rank, progress) if limit else []
        if self.plot:
            draw(self.plot, runs, parse_bytes(self.fit, "--fit") if self.fit else None)
        if self.json:
            facts = {"torch": version("torch"), "config": self.config, "caveat": CAVEAT}
            write_json(
                self.json, {**facts, "runs": [as_json(run) for run in runs], "fit": [asdict(fit) for fit in found]}
            )
        if self.json != STDOUT:
            show(console, runs, found, self.fit, self.reserve)

    def _checked(self) -> tuple[list[int], int | None]:
        """Numbers of ranks, and bytes that a run may use; raises ValueError for invalid flags."""
        check_config(self.config)
        given = self.ngpu or os.environ.get("NGPU", "")
        words = [word.strip() for word in given.split(",") if word.strip()]
        if not words:
            raise ValueError("the number of ranks is not known: give --ngpu N or --ngpu N,N,..., or set NGPU=N")
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--ngpu {given}: give positive numbers of ranks, separated by commas")
        check_file("--json", self.json)
        check_file("--plot", self.plot)
        if unknown := [question for question in self._varied() if question not in LIMITS]:
            raise ValueError(f"--vary {', '.join(unknown)}: it takes {', '.join(LIMITS)}, separated by commas")
        if not self.fit:
            return [int(word) for word in words], None
        if len(words) > 1:
            raise ValueError(f"--fit starts from one number of ranks and tries others: give one, not {given}")
        limit = parse_bytes(self.fit, "--fit") - parse_bytes(self.reserve, "--reserve")
        if limit <= 0:
            raise ValueError(f"--reserve {self.reserve} leaves nothing of --fit {self.fit}")
        return [int(word) for word in words], limit

    def _varied(self) -> list[str]:
        return [word.strip() for word in self.vary.split(",")]


def parse_bytes(text: str, flag: str) -> int:
    """Bytes from text such as 80GiB, 80GB, 512MiB."""
    units = {"B": 1, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": GIB, "TB": 10**12, "TiB": 1 << 40}
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?i?B)", text.strip())
    try:
        return int(float(match[1]) * units[match[2]])  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{flag} {text!r} is not an amount of memory: write it like 80GiB; units are {', '.join(units)}"
        ) from None
