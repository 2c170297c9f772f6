"""The command `bench`: its flags, and the order of what is done."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import atomic_write
from ..tools.flags import ConfigFile, check_config, check_file, number_of_ranks
from ..tools.isolated_process import in_isolated_process
from ..tools.versions import device_name, version

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .measure import Measured
    from .part import Part


@dataclass
class Bench:
    """Show step time and state of AdamW, AdamMini and their peers side by side, on the shapes that one rank holds.

    The model is built by torchtitan on the meta device at the real number of ranks; only one rank's part is allocated,
    with random gradients. Takes any of torchtitan's --section.key value besides; the configuration may also be given
    as --job.config_file X or CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: int | None = None
    """Number of ranks of the run."""

    rank: int = 0
    """The rank whose part is measured."""

    repeats: int = 20
    """Timed steps of every optimizer, after three that are not timed."""

    layers: int | None = None
    """Keep only so many of the model's transformer layers."""

    only: str = ""
    """Parts of the names to measure, such as "AdamMini,torchao"; AdamW fused always is."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the parameters: as --training.dtype, which the configuration gives."""

    device: Literal["cuda", "cpu"] | None = None
    """Where; a GPU if there is one."""

    threads: int | None = None
    """Threads on the CPU; torch's choice if not given."""

    json: Path | None = None
    """A file for everything that was seen, every single time included."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        ngpu = self._checked()
        import torch

        from .competitors import chosen
        from .measure import measure
        from .part import allocated
        from .tables import row_of, show

        device = self._device()
        dtype = ["--training.dtype", self.dtype] if self.dtype else []
        part: Part = in_isolated_process(_read_part, [*arguments, *dtype], ngpu, self.rank, self.layers)
        competitors = chosen(self.only, part)
        self._fits(part, device)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with allocated(part, ngpu, self.rank, device) as tensors:
                measured = measure(competitors, part, tensors, device, self.repeats)
            facts = self._facts(part, measured, device, ngpu, arguments)
        finally:
            torch.set_num_threads(before)
        rows = [row_of(result, part, measured) for result in measured.results]
        if self.json:
            atomic_write(self.json, json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        show(facts, rows, console)

    def _checked(self) -> int:
        """The number of ranks; ValueError for flags that cannot be served."""
        check_config(self.config)
        ngpu = number_of_ranks(self.ngpu)
        if not 0 <= self.rank < ngpu:
            raise ValueError(f"--rank {self.rank} is none of {ngpu} ranks: they are 0 to {ngpu - 1}")
        if self.repeats < 2:
            raise ValueError(f"--repeats must be 2 or more, not {self.repeats}: one time has no spread")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be 1 or more, not {self.threads}")
        check_file("--json", self.json)
        return ngpu

    def _device(self) -> torch.device:
        """Where to measure; ValueError if there is no such device."""
        import torch

        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("--device cuda: torch finds no GPU here")
        kind = self.device or ("cuda" if cuda else "cpu")
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def _fits(self, part: Part, device: torch.device) -> None:
        """ValueError if the memory that is free is not enough."""
        from .measure import bytes_free, bytes_needed

        needed, free = bytes_needed(part, device), bytes_free(device)
        if not part.numel:
            raise ValueError(f"rank {self.rank} holds no parameters: choose another with --rank")
        if free is not None and needed > free:
            raise ValueError(
                f"rank {self.rank}'s {part.numel:,} parameters need {needed / 2**30:.1f} GiB with gradients and the "
                f"largest state, and {free / 2**30:.1f} GiB are free on {device.type}: keep fewer layers with "
                "--layers L, or look at a run of more ranks with --ngpu N"
            )

    def _facts(
        self, part: Part, measured: Measured, device: torch.device, ngpu: int, arguments: list[str]
    ) -> dict[str, Any]:
        """What the caption says, and the JSON beside the rows."""
        import torch

        held = [one for one in part.held if one.numel]
        return {
            "device": device_name(device, torch.get_num_threads()),
            "torch": version("torch"),
            "triton": version("triton"),
            "model": part.model,
            "config": self.config,
            "ngpu": ngpu,
            "rank": self.rank,
            "layers": part.layers,
            "parameters": part.numel,
            "tensors": len(held),
            "sharded": part.sharded,
            "dtypes": sorted({str(one.dtype).removeprefix("torch.") for one in held}),
            "repeats": self.repeats,
            "turns": measured.turns,
            "copy_bytes": measured.copy_bytes,
            "copy_ms": measured.copy.ms,
            "copy_bytes_per_second": measured.bandwidth,
            "command": self._command(ngpu, arguments),
        }

    def _command(self, ngpu: int, arguments: list[str]) -> str:
        """The command that was given, whichever way its parts came in."""
        words = ["titan-adam-mini", "bench", self.config, "--ngpu", str(ngpu)]
        for name in ("rank", "repeats", "layers", "only", "dtype", "device", "threads", "json"):
            if (value := getattr(self, name)) != getattr(Bench, name):
                words += [f"--{name}", str(value)]
        return shlex.join([*words, *arguments[2:]])


def _read_part(*args: Any) -> Any:
    from .shards import read_part

    return read_part(*args)
