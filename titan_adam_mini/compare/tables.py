"""A comparison's runs for other tools: runs.csv with a row per run, steps.csv with a row per run and step."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ..files import replacing
from .plan import Run
from .record import COLUMNS, Record


def write_runs(
    file: Path, records: Mapping[Run, Record], optimizers: Mapping[str, str], state: Mapping[str, float]
) -> None:
    """Write a row per run.

    Args:
        file: where to.
        records: the runs.
        optimizers: variant -> torchtitan's name of its optimizer.
        state: variant -> bytes of optimizer state per parameter.
    """
    rows: list[dict[str, Any]] = []
    for run, one in sorted(records.items()):
        norm, highest = one.grad_norm
        rows.append(
            {
                "variant": run.variant,
                "optimizer": optimizers[run.variant],
                "lr": run.lr,
                "seed": run.seed,
                "status": "finished" if one.diverged is None else "diverged",
                "steps": one.steps,
                "validation_loss": one.final,
                "perplexity": perplexity(one.final),
                "first_loss": one.losses[0] if one.losses else math.nan,
                "last_loss": one.losses[-1] if one.losses else math.nan,
                "spikes": one.spikes,
                "grad_norm_median": norm,
                "grad_norm_max": highest,
                "peak_active_gib": one.peak("active_gib"),
                "peak_reserved_gib": one.peak("reserved_gib"),
                "tokens_per_second": one.tokens_per_second,
                "seconds_per_step": one.seconds_per_step,
                "seconds": sum(one.columns["seconds"]),
                "state_bytes_per_parameter": state[run.variant],
                "folder": run.folder,
            }
        )
    _write(file, iter(rows))


def write_steps(file: Path, records: Mapping[Run, Record]) -> None:
    """Write a row per run and step: COLUMNS, with `lr_now` for the schedule's learning rate, and the validation loss
    where there is one."""

    def rows() -> Iterator[dict[str, Any]]:
        for run, one in sorted(records.items()):
            for place in range(one.steps):
                about = {"variant": run.variant, "lr": run.lr, "seed": run.seed, "step": place + 1}
                columns = {"lr_now" if name == "lr" else name: one.columns[name][place] for name in COLUMNS}
                yield {**about, **columns, "validation_loss": one.validation.get(place + 1, "")}

    _write(file, rows())


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows, None)
    with replacing(file) as stream:
        written = TextIOWrapper(stream, newline="", encoding="utf-8")
        writer = csv.DictWriter(written, list(first or ()))
        writer.writeheader()
        if first is not None:
            writer.writerow(first)
        writer.writerows(rows)
        written.detach()
