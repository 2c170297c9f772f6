"""Helpers for pictures: figures without a window, saving, and line breaks."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ..files import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
"""Okabe and Ito's colours (2008), distinguishable with any colour vision, for lines on white."""


def figure(width: float, height: float) -> Any:
    """An empty figure, with sizes in inches. Raises ValueError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'titan-adam-mini[titan]'") from None
    picture: Any = Figure(figsize=(width, height), layout="constrained")
    picture.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(picture)
    return picture


def save(picture: Any, file: str | Path, dpi: int = 160) -> None:
    """Write a picture atomically, in the format of the file's suffix (PNG without one)."""
    with replacing(file) as stream:
        picture.savefig(stream, dpi=dpi, format=Path(file).suffix[1:] or "png")


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is not installed, for commands that draw at the very end."""
    figure(1, 1)


def wrapped(text: str, inches: float, size: float) -> str:
    """Text with lines of at most this width; a letter is about half as wide as high."""
    columns = int(inches * 72 / (size * 0.54))
    return "\n".join(textwrap.fill(line, columns) for line in text.splitlines())


def bare(axes: Any) -> None:
    """Give axes grid lines instead of a frame."""
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
