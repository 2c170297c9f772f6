"""What a run said: every step, to the bit, from torchtitan's TensorBoard files. Its log has five decimals."""

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
"""A spike is a loss above the mean of so many losses before it by more than so many standard deviations."""
WARM_UP = 5
"""Steps that count for no speed: they allocate and compile."""


@dataclass
class Record:
    """A run, or as much of it as there is.

    Attributes:
        run: which one.
        ranks: number of processes.
        columns: those of COLUMNS, one value per step, from step 1 on without a hole.
        validation: step -> loss.
        diverged: the first step whose loss is no finite number; None if there is none.
        made: device, versions and commit, by name; what is not known is left out.
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
        """Of all ranks together."""
        rates = self.columns["tokens_per_second"]
        return median(rates[WARM_UP:] or rates) * self.ranks

    def peak(self, column: str) -> float:
        """The largest value of a column."""
        return max(self.columns[column], default=math.nan)

    @property
    def grad_norm(self) -> tuple[float, float]:
        """Median and maximum."""
        return median(self.columns["grad_norm"]), self.peak("grad_norm")

    def known(self, frequency: int) -> int:
        """The last step up to which there is everything, validation that was due included."""
        for step in range(1, self.steps + 1):
            if (step == 1 or step % frequency == 0) and step not in self.validation:
                return step - 1
        return self.steps

    def write(self, file: Path) -> None:
        """Into a file that is whole at any moment."""
        atomic_write(file, json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Record:
        """What `write` wrote."""
        told = json.loads(file.read_text())
        told["run"] = Run(*told["run"])
        told["validation"] = {int(step): loss for step, loss in told["validation"].items()}
        return cls(**told)


def read(board: Path, run: Run, ranks: int) -> Record:
    """What TensorBoard's files hold of a run so far, cut off after the first loss that is no finite number.

    Args:
        board: the folder with torchtitan's event files.
        run: which one it is.
        ranks: number of processes.
    """
    found: dict[str, dict[int, float]] = {}
    if board.is_dir():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every further start of a run
        events = EventAccumulator(str(board), size_guidance={"scalars": 0})
        events.Reload()
        there = set(events.Tags()["scalars"])
        for tag in there.intersection({*COLUMNS.values(), VALIDATION}):
            found[tag] = {one.step: one.value for one in events.Scalars(tag)}
    every = [found.get(tag, {}) for tag in COLUMNS.values()]
    steps = 0
    while all(steps + 1 in one for one in every):
        steps += 1
    columns = {name: [one[step] for step in range(1, steps + 1)] for name, one in zip(COLUMNS, every, strict=True)}
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
    """How many losses are above the mean of the WINDOW before them by more than DEVIATIONS standard deviations."""
    count = 0
    for place in range(WINDOW, len(losses)):
        before = losses[place - WINDOW : place]
        mean = sum(before) / WINDOW
        deviation = math.sqrt(sum((loss - mean) ** 2 for loss in before) / (WINDOW - 1))
        count += losses[place] > mean + DEVIATIONS * deviation
    return count
