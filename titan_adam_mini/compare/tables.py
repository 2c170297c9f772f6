"""A comparison's runs as CSV: runs.csv with a row per run, steps.csv with a row per run and step."""

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
        file: the CSV file.
        records: the runs.
        optimizers: variant -> torchtitan's name of its optimizer.
        state: variant -> bytes of optimizer state per parameter.
    """
    rows: list[dict[str, Any]] = []
    for run, record in sorted(records.items()):
        norm, highest = record.grad_norm
        rows.append(
            {
                "variant": run.variant,
                "optimizer": optimizers[run.variant],
                "lr": run.lr,
                "seed": run.seed,
                "status": "finished" if record.diverged is None else "diverged",
                "steps": record.steps,
                "validation_loss": record.final,
                "perplexity": perplexity(record.final),
                "first_loss": record.losses[0] if record.losses else math.nan,
                "last_loss": record.losses[-1] if record.losses else math.nan,
                "spikes": record.spikes,
                "grad_norm_median": norm,
                "grad_norm_max": highest,
                "peak_active_gib": record.peak("active_gib"),
                "peak_reserved_gib": record.peak("reserved_gib"),
                "tokens_per_second": record.tokens_per_second,
                "seconds_per_step": record.seconds_per_step,
                "seconds": sum(record.columns["seconds"]),
                "state_bytes_per_parameter": state[run.variant],
                "folder": run.folder,
            }
        )
    _write(file, iter(rows))


def write_steps(file: Path, records: Mapping[Run, Record]) -> None:
    """Write a row per run and step: COLUMNS, with `lr_now` for the schedule's learning rate, and the validation loss
    of steps that were validated."""

    def rows() -> Iterator[dict[str, Any]]:
        for run, record in sorted(records.items()):
            for index in range(record.steps):
                keys = {"variant": run.variant, "lr": run.lr, "seed": run.seed, "step": index + 1}
                columns = {"lr_now" if name == "lr" else name: record.columns[name][index] for name in COLUMNS}
                yield {**keys, **columns, "validation_loss": record.validation.get(index + 1, "")}

    _write(file, rows())


def perplexity(loss: float) -> float:
    """exp(loss), infinite if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows, None)
    with replacing(file) as stream:
        text = TextIOWrapper(stream, newline="", encoding="utf-8")
        writer = csv.DictWriter(text, list(first or ()))
        writer.writeheader()
        if first is not None:
            writer.writerow(first)
        writer.writerows(rows)
        text.detach()
