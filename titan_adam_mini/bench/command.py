"""The command `bench`."""

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
    from .rank_params import RankParams


@dataclass
class Bench:
    """Show step time and state of AdamW, AdamMini and their peers side by side, on the tensors of one rank.

    torchtitan builds the model on the meta device at the real number of ranks; only the parameters of one rank are
    allocated, with random gradients. Takes any torchtitan --section.key value as well; the configuration may also be
    given as --job.config_file X or CONFIG_FILE=X, the number of ranks as NGPU=N.
    """

    config: ConfigFile
    """torchtitan's configuration."""

    ngpu: int | None = None
    """Number of ranks of the run."""

    rank: int = 0
    """The rank whose parameters are used."""

    repeats: int = 20
    """Timed steps of every optimizer, after three that are not timed."""

    layers: int | None = None
    """Keep only this many of the model's transformer layers."""

    only: str = ""
    """Measure only optimizers whose names contain one of these, such as "AdamMini,torchao"; AdamW fused always is."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the parameters; the configuration's --training.dtype if not given."""

    device: Literal["cuda", "cpu"] | None = None
    """The device; a GPU if there is one."""

    threads: int | None = None
    """Threads on the CPU; torch's choice if not given."""

    json: Path | None = None
    """A file for all results, with every single time."""

    def __call__(self, console: Console, arguments: list[str]) -> None:
        ngpu = self._checked()
        import torch

        from .competitors import chosen
        from .measure import measure
        from .rank_params import allocated
        from .tables import row_of, show

        device = self._device()
        dtype = ["--training.dtype", self.dtype] if self.dtype else []
        rank_params: RankParams = in_isolated_process(
            _read_rank_params, [*arguments, *dtype], ngpu, self.rank, self.layers
        )
        competitors = chosen(self.only, rank_params)
        self._fits(rank_params, device)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with allocated(rank_params, ngpu, self.rank, device) as tensors:
                measured = measure(competitors, rank_params, tensors, device, self.repeats)
            facts = self._facts(rank_params, measured, device, ngpu, arguments)
        finally:
            torch.set_num_threads(before)
        rows = [row_of(result, rank_params, measured) for result in measured.results]
        if self.json:
            atomic_write(self.json, json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        show(facts, rows, console)

    def _checked(self) -> int:
        """The number of ranks; raises ValueError for invalid flags."""
        check_config(self.config)
        ngpu = number_of_ranks(self.ngpu)
        if not 0 <= self.rank < ngpu:
            raise ValueError(f"--rank {self.rank} is not one of {ngpu} ranks: they are 0 to {ngpu - 1}")
        if self.repeats < 2:
            raise ValueError(f"--repeats must be 2 or more, not {self.repeats}: a single time has no spread")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be 1 or more, not {self.threads}")
        check_file("--json", self.json)
        return ngpu

    def _device(self) -> torch.device:
        """The device to measure on; raises ValueError if there is no such device."""
        import torch

        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("--device cuda: torch finds no GPU here")
        kind = self.device or ("cuda" if cuda else "cpu")
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def _fits(self, rank_params: RankParams, device: torch.device) -> None:
        """Raise ValueError if there is not enough free memory."""
        from .measure import bytes_free, bytes_needed

        needed, free = bytes_needed(rank_params, device), bytes_free(device)
        if not rank_params.numel:
            raise ValueError(f"rank {self.rank} has no parameters: choose another with --rank")
        if free is not None and needed > free:
            raise ValueError(
                f"rank {self.rank}'s {rank_params.numel:,} parameters need {needed / 2**30:.1f} GiB with gradients and "
                f"the largest state, and {free / 2**30:.1f} GiB are free on {device.type}: keep fewer layers with "
                "--layers L, or measure a run of more ranks with --ngpu N"
            )

    def _facts(
        self, rank_params: RankParams, measured: Measured, device: torch.device, ngpu: int, arguments: list[str]
    ) -> dict[str, Any]:
        """The facts in the caption and, beside the rows, in the JSON."""
        import torch

        params = [param for param in rank_params.params if param.numel]
        return {
            "device": device_name(device, torch.get_num_threads()),
            "torch": version("torch"),
            "triton": version("triton"),
            "model": rank_params.model,
            "config": self.config,
            "ngpu": ngpu,
            "rank": self.rank,
            "layers": rank_params.layers,
            "parameters": rank_params.numel,
            "tensors": len(params),
            "sharded": rank_params.sharded,
            "dtypes": sorted({str(param.dtype).removeprefix("torch.") for param in params}),
            "repeats": self.repeats,
            "turns": measured.turns,
            "copy_bytes": measured.copy_bytes,
            "copy_ms": measured.copy.ms,
            "copy_bytes_per_second": measured.bandwidth,
            "command": self._command(ngpu, arguments),
        }

    def _command(self, ngpu: int, arguments: list[str]) -> str:
        """The command line, with settings that came from the environment."""
        words = ["titan-adam-mini", "bench", self.config, "--ngpu", str(ngpu)]
        for name in ("rank", "repeats", "layers", "only", "dtype", "device", "threads", "json"):
            if (value := getattr(self, name)) != getattr(Bench, name):
                words += [f"--{name}", str(value)]
        return shlex.join([*words, *arguments[2:]])


def _read_rank_params(*args: Any) -> Any:
    from .shards import read_rank_params

    return read_rank_params(*args)
