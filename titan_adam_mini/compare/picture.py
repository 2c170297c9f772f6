"""Pictures of a comparison: a line per variant, the mean over its seeds, and a band from the lowest to the highest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..tools.figures import COLOURS, bare, figure, save, wrapped
from .record import Record

LOSS, VALIDATION, RATES, NORM = "loss.png", "validation.png", "lr.png", "grad_norm.png"
_WIDTH, _HEIGHT, _TEXT, _TITLE = 7.5, 4.4, 8, 11
_WINDOWS = 50
"""A curve of training losses is a running mean over one part in so many of its steps."""

Curve = tuple[list[float], list[float]]
"""x and y."""


def draw(
    out: Path,
    title: str,
    chosen: Mapping[str, Mapping[int, Record]],
    swept: Mapping[str, Mapping[float, float]],
) -> list[str]:
    """Draw all pictures into a folder; returns the names of those that are not empty.

    Args:
        out: the folder.
        title: what was trained.
        chosen: variant -> seed -> its run at the variant's learning rate.
        swept: variant -> learning rate -> last validation loss with the first seed; empty without a sweep.

    Raises:
        ValueError: matplotlib is not installed.
    """
    converged = {name: [record for record in runs.values() if record.diverged is None] for name, runs in chosen.items()}
    longest = max((record.steps for runs in converged.values() for record in runs), default=0)
    window = max(1, longest // _WINDOWS)
    smooth = f"Training loss, a running mean over {window} steps." if window > 1 else "Training loss."
    names = []
    if longest:
        picture = figure(2 * _WIDTH, _HEIGHT)
        left, right = picture.subplots(1, 2, sharey=True)
        _lines(left, converged, lambda record: _smooth(list(range(1, record.steps + 1)), record.losses, window))
        _lines(
            right, converged, lambda record: _smooth(list(accumulate(record.columns["seconds"])), record.losses, window)
        )
        left.set(xlabel="step", ylabel="loss")
        right.set_xlabel("seconds, without validation")
        _finish(picture, out / LOSS, title, f"{smooth} {_bands(converged)}")
        picture, axes = _new_picture()
        _lines(axes, converged, _validated(converged), marker="o")
        axes.set(xlabel="step", ylabel="validation loss")
        _finish(picture, out / VALIDATION, title, _bands(converged))
        picture, axes = _new_picture()
        _lines(
            axes, converged, lambda record: (list(map(float, range(1, record.steps + 1))), record.columns["grad_norm"])
        )
        axes.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
        _finish(picture, out / NORM, title, _bands(converged))
        names += [LOSS, VALIDATION, NORM]
    if any(math.isfinite(loss) for losses in swept.values() for loss in losses.values()):
        picture, axes = _new_picture()
        for (name, losses), colour in zip(swept.items(), _colours(), strict=False):
            finite = [(lr, loss) for lr, loss in sorted(losses.items()) if math.isfinite(loss)]
            axes.plot(*zip(*finite, strict=True), marker="o", color=colour, label=name) if finite else None
        axes.set(xlabel="learning rate", ylabel="last validation loss", xscale="log")
        rates = sorted({lr for losses in swept.values() for lr in losses})
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=_TEXT)
        axes.minorticks_off()
        _finish(picture, out / RATES, title, "The first seed. Runs that diverged are not shown.")
        names.append(RATES)
    return names


def _new_picture() -> tuple[Any, Any]:
    picture = figure(_WIDTH, _HEIGHT)
    return picture, picture.add_subplot()


def _colours() -> list[str]:
    return list(COLOURS) * 8


def _lines(
    axes: Any, runs: Mapping[str, Sequence[Record]], curve: Callable[[Record], Curve], marker: str | None = None
) -> None:
    """A line and a band per variant, up to the last step that all its seeds have."""
    for (name, records), colour in zip(runs.items(), _colours(), strict=False):
        if not records:
            continue
        all_x, all_y = zip(*(curve(record) for record in records), strict=True)
        x = [statistics.fmean(values) for values in zip(*all_x, strict=False)]
        y = list(zip(*all_y, strict=False))
        axes.plot(x, [statistics.fmean(values) for values in y], color=colour, linewidth=1.2, marker=marker, label=name)
        if len(records) > 1:
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=colour, alpha=0.2, linewidth=0)


def _validated(runs: Mapping[str, Sequence[Record]]) -> Callable[[Record], Curve]:
    """Validation losses at the steps that all runs have; without step 1 if there are later ones, because the loss of an
    untrained model would flatten all others."""
    common = sorted(set.intersection(*({*record.validation} for records in runs.values() for record in records)))
    steps = [step for step in common if step > 1 or len(common) < 3]
    return lambda record: ([float(step) for step in steps], [record.validation[step] for step in steps])


def _smooth(x: Sequence[float], y: Sequence[float], window: int) -> Curve:
    """Means over the last `window` values, from the first step that has as many."""
    ends = range(window, len(y) + 1)
    return [float(x[end - 1]) for end in ends], [statistics.fmean(y[end - window : end]) for end in ends]


def _bands(runs: Mapping[str, Sequence[Record]]) -> str:
    return (
        "Mean over the seeds; bands go from the lowest to the highest."
        if any(len(records) > 1 for records in runs.values())
        else ""
    )


def _finish(picture: Any, file: Path, title: str, note: str) -> None:
    for axes in picture.axes:
        bare(axes)
    picture.axes[-1].legend(frameon=False, fontsize=_TEXT + 1)
    picture.suptitle(wrapped(title, picture.get_figwidth(), _TITLE), x=0.02, ha="left", fontsize=_TITLE)
    if note:
        words = wrapped(note, 0.96 * picture.get_figwidth(), _TEXT)
        picture.supxlabel(words, x=0.02, ha="left", fontsize=_TEXT, color="#505050")
    save(picture, file, dpi=130)
