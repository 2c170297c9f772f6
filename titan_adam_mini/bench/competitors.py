"""The optimizers that are measured: one row each, built with the configuration's hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..optimizer import AdamMini
from .rank_params import Named, RankParams

BASELINE = "AdamW fused"


@dataclass(frozen=True)
class Competitor:
    """One row of the table.

    Attributes:
        name: in the table.
        build: builds the optimizer for named parameters; the optimizer's own errors propagate.
        sharded: whether it steps the run's own parameters (DTensors) instead of the plain local tensors.
        package: its distribution on PyPI, "" for torch and this package.
        module: the module to import.
    """

    name: str
    build: Callable[[Named, RankParams], Any]
    sharded: bool = False
    package: str = ""
    module: str = ""

    def installed(self) -> bool:
        """Whether its package is installed. An import that fails for another reason raises."""
        if not self.module:
            return True
        try:
            import_module(self.module)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != self.module.split(".")[0]:
                raise
            return False
        return True

    @property
    def version(self) -> str:
        """Version of its package; "" for torch and this package, or if it is unknown."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return ""


def _adamw(**flags: bool) -> Callable[[Named, RankParams], Any]:
    def build(named: Named, rank_params: RankParams) -> Any:
        return torch.optim.AdamW([param for _, param in named], **rank_params.hyper, **flags)

    return build


def _adam_mini(momentum_dtype: torch.dtype | None, **flags: Any) -> Callable[[Named, RankParams], Any]:
    def build(named: Named, rank_params: RankParams) -> Any:
        return AdamMini(
            named, **rank_params.hyper, partition=rank_params.partition, momentum_dtype=momentum_dtype, **flags
        )

    return build


def _authors(named: Named, rank_params: RankParams) -> Any:
    if None in (rank_params.heads.get("dim"), rank_params.heads.get("n_heads")):
        raise ValueError("it needs `dim` and `n_heads`, which this model does not have")
    return import_module("adam_mini").Adam_mini(named, **rank_params.hyper, **rank_params.heads, verbose=False)


def _peer(module: str, name: str) -> Callable[[Named, RankParams], Any]:
    def build(named: Named, rank_params: RankParams) -> Any:
        return getattr(import_module(module), name)([param for _, param in named], **rank_params.hyper)

    return build


def _flash(named: Named, rank_params: RankParams) -> Any:
    """flashoptim's optimizer; its 24-bit master weights are only for bfloat16 parameters."""
    bits = None if all(param.dtype == torch.float32 for _, param in named) else 24
    build = import_module("flashoptim").FlashAdamW
    return build([param for _, param in named], **rank_params.hyper, master_weight_bits=bits)


COMPETITORS = (
    Competitor(BASELINE, _adamw(fused=True)),
    Competitor("AdamW foreach", _adamw(foreach=True)),
    Competitor("AdamW fused on DTensors", _adamw(fused=True), sharded=True),
    Competitor("AdamMini fused, float32", _adam_mini(torch.float32, fused=True), sharded=True),
    Competitor("AdamMini fused, bfloat16", _adam_mini(torch.bfloat16, fused=True), sharded=True),
    Competitor("AdamMini fused, int8", _adam_mini(torch.int8, fused=True), sharded=True),
    Competitor("AdamMini foreach", _adam_mini(None, foreach=True), sharded=True),
    Competitor("adam-mini, the authors'", _authors, package="adam-mini", module="adam_mini"),
    Competitor("torchao AdamW8bit", _peer("torchao.optim", "AdamW8bit"), package="torchao", module="torchao.optim"),
    Competitor(
        "bitsandbytes AdamW8bit",
        _peer("bitsandbytes.optim", "AdamW8bit"),
        package="bitsandbytes",
        module="bitsandbytes.optim",
    ),
    Competitor("flashoptim FlashAdamW", _flash, package="flashoptim", module="flashoptim"),
)


def chosen(only: str, rank_params: RankParams) -> list[Competitor]:
    """The competitors whose names contain one of the words in `only` ("a,b"; "" for all), and always the baseline.

    Raises ValueError for a word that is in no name.
    """
    rows = [row for row in COMPETITORS if rank_params.sharded or "on DTensors" not in row.name]
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(word in row.name.lower() for row in rows):
            raise ValueError(f"--only {word!r} is in no name; the names are {'; '.join(row.name for row in rows)}")
    return [row for row in rows if not words or row.name == BASELINE or any(w in row.name.lower() for w in words)]
