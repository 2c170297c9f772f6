"""Pictures of memory: one stacked bar per run, one colour per category, in GiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from ..tools.figures import bare, figure, save, wrapped

GIB = 1 << 30

# From bottom to top. The colours are Okabe and Ito's (2008), which people of every colour vision tell apart.
CATEGORIES = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer state": "#D55E00",
    "activations": "#009E73",
    "all-gather": "#F0E442",
    "reduce-scatter": "#E69F00",
    "temporaries": "#CC79A7",
    "other": "#8C8C8C",
    "reserved, unused": "#FFFFFF",
}
"""Category -> colour; `reserved, unused` is hatched."""

_HATCHED = "reserved, unused"
_DARK = ("parameters", "optimizer state", "activations")
"""Categories with white figures inside."""
_HEIGHT, _PITCH, _LEGEND = 5.2, 1.15, 1.7
"""Inches: height, from bar to bar, width of the legend."""
_TEXT, _TITLE = 8, 11


def stacked_bars(
    path: Path,
    title: str,
    bars: Sequence[tuple[str, Mapping[str, int]]],
    *,
    budget: int | None = None,
    note: str = "",
) -> None:
    """Draw one stacked bar per run into a file.

    Args:
        path: the file; its suffix gives the format (png, svg, pdf).
        title: above the picture.
        bars: (label, category -> bytes) from left to right; a label may have several lines. Categories are keys of
            CATEGORIES; those that are zero everywhere are left out.
        budget: bytes at which a dashed line is drawn.
        note: small text below.

    Raises:
        ValueError: matplotlib is not installed, or a category or the format is unknown.
    """
    unknown = sorted({category for _, sizes in bars for category in sizes if category not in CATEGORIES})
    if unknown:
        raise ValueError(f"no colour for {', '.join(unknown)}: categories are {', '.join(CATEGORIES)}")
    drawing = figure(3.4 + _PITCH * max(2, len(bars)), _HEIGHT)
    axes = drawing.add_subplot()
    totals = [sum(sizes.values()) / GIB for _, sizes in bars]
    top = 1.12 * max([*totals, (budget or 0) / GIB]) or 1.0
    bottoms = [0.0] * len(bars)
    handles = []
    for category, colour in CATEGORIES.items():
        heights = [sizes.get(category, 0) / GIB for _, sizes in bars]
        if not any(heights):
            continue
        # A white edge would hide a thin segment.
        edges = [0.8 if height >= 0.01 * top else 0 for height in heights]
        style: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": edges}
        if category == _HATCHED:
            style |= {"edgecolor": "#B0B0B0", "hatch": "////", "linewidth": 0.8}
        handles.append(axes.bar(range(len(bars)), heights, 0.66, bottoms, label=category, zorder=2, **style))
        for place, (height, bottom) in enumerate(zip(heights, bottoms, strict=True)):
            if height >= 0.033 * top:
                style = {"ha": "center", "va": "center", "fontsize": _TEXT, "zorder": 4}
                style["color"] = "white" if category in _DARK else "black"
                # A background keeps numbers legible over the hatch and the budget line.
                style["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                axes.text(place, bottom + height / 2, _number(height), **style)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(totals):
        style = {"ha": "center", "va": "bottom", "fontsize": _TEXT + 1.5, "fontweight": "bold", "zorder": 4}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.annotate(_number(total), (place, total), (0, 3), textcoords="offset points", **style)
    if budget is not None:
        axes.axhline(budget / GIB, color="black", linestyle=(0, (5, 3)), linewidth=1.2, zorder=3)
        words = f"budget\n{_number(budget / GIB)} GiB"
        beside = (1.01, budget / GIB)
        axes.text(*beside, words, transform=axes.get_yaxis_transform(), va="center", fontsize=_TEXT + 0.5)
    drawing.suptitle(wrapped(title, drawing.get_figwidth() - _LEGEND, _TITLE), x=0.02, ha="left", fontsize=_TITLE)
    axes.set_ylabel("GiB")
    axes.set_ylim(0, top)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    labels = [wrapped(label, _PITCH, _TEXT + 1) for label, _ in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize=_TEXT + 1)
    axes.tick_params(axis="x", length=0)
    bare(axes)
    # The legend has the order of the bars, from top to bottom.
    drawing.legend(handles=handles[::-1], loc="outside right upper", frameon=False, fontsize=_TEXT + 1)
    if note:
        words = wrapped(note, 0.96 * drawing.get_figwidth(), _TEXT)
        drawing.supxlabel(words, x=0.02, ha="left", fontsize=_TEXT, color="#505050", linespacing=1.3)
    save(drawing, path)


def _number(gib: float) -> str:
    """Three significant digits: 53.9, 4.02, 0.0584."""
    if not gib:
        return "0"
    return f"{gib:.{max(0, 2 - floor(log10(abs(gib))))}f}"
