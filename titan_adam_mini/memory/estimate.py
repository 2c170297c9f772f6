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

    Takes any of torchtitan's --section.key value besides; the configuration may also be given as --job.config_file X
    or CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: str = ""
    """Numbers of ranks, such as 8,64,512."""

    rank: int | None = None
    """The rank to simulate; the first of every pipeline stage if not given, of which the largest is shown."""

    fit: str = ""
    """Memory of a GPU, such as 80GiB: find the largest local batch, the longest sequence and the fewest GPUs that fit
    with AdamW and with AdamMini, for each mode of activation checkpointing."""

    reserve: str = "6GiB"
    """What --fit leaves free for the CUDA context, NCCL and fragmentation."""

    vary: str = ",".join(LIMITS)
    """What --fit looks for."""

    json: JsonFile = None
    """JSON in place of the tables, every size in bytes; into a file, if one is named, beside them."""

    plot: Path | None = None
    """A picture: stacked bars of AdamW and AdamMini for every number of ranks."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        numbers, room = self._checked()
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from .peak_tables import CAVEAT, as_json, draw, show
        from .peaks import fits, simulated

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress, isolated_process() as call:
            runs = []
            for ngpu in numbers:
                task = progress.add_task(f"simulating {ngpu:,} ranks", total=None)
                runs.append(simulated(call, arguments, ngpu, self.rank))
                progress.remove_task(task)
            found = fits(runs[-1], arguments, self._varied(), room, self.rank, progress) if room else []
        if self.plot:
            draw(self.plot, runs, parse_bytes(self.fit, "--fit") if self.fit else None)
        if self.json:
            facts = {"torch": version("torch"), "config": self.config, "caveat": CAVEAT}
            write_json(
                self.json, {**facts, "runs": [as_json(run) for run in runs], "fit": [asdict(one) for one in found]}
            )
        if self.json != STDOUT:
            show(console, runs, found, self.fit, self.reserve)

    def _checked(self) -> tuple[list[int], int | None]:
        """Numbers of ranks, and bytes that may be filled; ValueError for flags that cannot be served."""
        check_config(self.config)
        given = self.ngpu or os.environ.get("NGPU", "")
        words = [word.strip() for word in given.split(",") if word.strip()]
        if not words:
            raise ValueError("the number of ranks is not known: give --ngpu N or --ngpu N,N,..., or set NGPU=N")
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--ngpu {given}: numbers of ranks are positive, with commas between them")
        check_file("--json", self.json)
        check_file("--plot", self.plot)
        if unknown := [one for one in self._varied() if one not in LIMITS]:
            raise ValueError(f"--vary {', '.join(unknown)}: it takes {', '.join(LIMITS)}, with commas between them")
        if not self.fit:
            return [int(word) for word in words], None
        if len(words) > 1:
            raise ValueError(f"--fit looks at one number of ranks and from there at others: give one, not {given}")
        room = parse_bytes(self.fit, "--fit") - parse_bytes(self.reserve, "--reserve")
        if room <= 0:
            raise ValueError(f"--reserve {self.reserve} leaves nothing of --fit {self.fit}")
        return [int(word) for word in words], room

    def _varied(self) -> list[str]:
        return [word.strip() for word in self.vary.split(",")]


def parse_bytes(text: str, flag: str) -> int:
    """Bytes from words such as 80GiB, 80GB, 512MiB."""
    units = {"B": 1, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": GIB, "TB": 10**12, "TiB": 1 << 40}
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?i?B)", text.strip())
    try:
        return int(float(found[1]) * units[found[2]])  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{flag} {text!r} is no amount of memory: write it as 80GiB, with {', '.join(units)}"
        ) from None
