"""The figures of a run, to the bit, from torchtitan's TensorBoard files (its log has five decimals only)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from ..files import atomic_write
from .plan import Run
from .statistics import median

COLUMNS = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tokens_per_second": "throughput(tps)",
    "seconds": "time_metrics/end_to_end(s)",
    "active_gib": "memory/max_active(GiB)",
    "reserved_gib": "memory/max_reserved(GiB)",
}
"""Column -> torchtitan's name: training loss over all ranks, norm before clipping, tokens per second of one rank,
seconds of the step without validation, GiB of the rank that reports."""
VALIDATION = "validation_metrics/loss"
WINDOW, DEVIATIONS = 50, 5.0
"""A spike is a loss more than DEVIATIONS standard deviations above the mean of the WINDOW losses before it."""
WARM_UP = 5
"""Steps that do not count for speed: they allocate and compile."""


@dataclass
class Record:
    """The figures of a run, finished or not.

    Attributes:
        run: the run.
        ranks: number of processes.
        columns: those of COLUMNS, one value per step, from step 1 on without gaps.
        validation: step -> loss.
        diverged: the first step whose loss is not finite; None if there is none.
        made: device, versions and commit, by name; unknown ones are left out.
    """

    run: Run
    ranks: int
    columns: dict[str, list[float]]
    validation: dict[int, float] = field(default_factory=dict)
    diverged: int | None = None
    made: dict[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """Training loss of step 1, 2, ..."""
        return self.columns["loss"]

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def final(self) -> float:
        """The last validation loss, infinite if the run diverged."""
        if self.diverged is not None or not self.validation:
            return math.inf
        return self.validation[max(self.validation)]

    @cached_property
    def spikes(self) -> int:
        return spikes(self.losses)

    @property
    def seconds_per_step(self) -> float:
        return median(self.columns["seconds"][WARM_UP:] or self.columns["seconds"])

    @property
    def tokens_per_second(self) -> float:
        """The sum over all ranks."""
        rates = self.columns["tokens_per_second"]
        return median(rates[WARM_UP:] or rates) * self.ranks

    def peak(self, column: str) -> float:
        """The largest value of a column."""
        return max(self.columns[column], default=math.nan)

    @property
    def grad_norm(self) -> tuple[float, float]:
        """Median and maximum."""
        return median(self.columns["grad_norm"]), self.peak("grad_norm")

    def complete_steps(self, validation_freq: int) -> int:
        """The last step up to which nothing is missing, with every validation that was due."""
        for step in range(1, self.steps + 1):
            if (step == 1 or step % validation_freq == 0) and step not in self.validation:
                return step - 1
        return self.steps

    def write(self, file: Path) -> None:
        """Write to a file, atomically."""
        atomic_write(file, json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Record:
        """Read a file that `write` wrote."""
        data = json.loads(file.read_text())
        data["run"] = Run(*data["run"])
        data["validation"] = {int(step): loss for step, loss in data["validation"].items()}
        return cls(**data)


def read(board: Path, run: Run, ranks: int) -> Record:
    """The figures of a run so far, up to the first loss that is not finite.

    Args:
        board: the folder with torchtitan's event files.
        run: the run.
        ranks: number of processes.
    """
    found: dict[str, dict[int, float]] = {}
    if board.is_dir():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns each time that a run was restarted
        events = EventAccumulator(str(board), size_guidance={"scalars": 0})
        events.Reload()
        tags = set(events.Tags()["scalars"])
        for tag in tags.intersection({*COLUMNS.values(), VALIDATION}):
            found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    series = [found.get(tag, {}) for tag in COLUMNS.values()]
    steps = 0
    while all(steps + 1 in values for values in series):
        steps += 1
    columns = {
        name: [values[step] for step in range(1, steps + 1)] for name, values in zip(COLUMNS, series, strict=True)
    }
    validation = {step: loss for step, loss in sorted(found.get(VALIDATION, {}).items()) if step <= steps}
    record = Record(run, ranks, columns, validation)
    bad = [step for step, loss in enumerate(columns["loss"], 1) if not math.isfinite(loss)]
    bad += [step for step, loss in validation.items() if not math.isfinite(loss)]
    if bad:
        record.diverged = min(bad)
        record.columns = {name: values[: record.diverged] for name, values in columns.items()}
        record.validation = {step: loss for step, loss in validation.items() if step <= record.diverged}
    return record


def spikes(losses: Sequence[float]) -> int:
    """The number of losses more than DEVIATIONS standard deviations above the mean of the WINDOW losses before them."""
    count = 0
    for place in range(WINDOW, len(losses)):
        before = losses[place - WINDOW : place]
        mean = sum(before) / WINDOW
        deviation = math.sqrt(sum((loss - mean) ** 2 for loss in before) / (WINDOW - 1))
        count += losses[place] > mean + DEVIATIONS * deviation
    return count
