"""Runs that nobody ran."""

from collections.abc import Sequence

from titan_adam_mini.compare.plan import Run
from titan_adam_mini.compare.record import COLUMNS, Record


def record(run: Run, losses: Sequence[float], validation: dict[int, float], diverged: int | None = None) -> Record:
    """A run with these losses: a tenth of a second and 100 tokens per second for each step, norms 1, 2, ..."""
    steps = len(losses)
    columns = {name: [1.0] * steps for name in COLUMNS}
    columns |= {"loss": list(losses), "seconds": [0.1] * steps, "tokens_per_second": [100.0] * steps}
    columns["grad_norm"] = [float(step) for step in range(1, steps + 1)]
    return Record(run, 2, columns, validation, diverged)
