"""The heat map of an inspection: layers from top to bottom, kinds of parameters across, a panel per candidate."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log10
from pathlib import Path
from typing import Any

from ..tools.figures import figure, save
from .findings import THRESHOLD, Inspection
from .measure import Loss

_CELL, _PANEL_EDGE, _WIDE = 0.21, 0.5, 16.0
"""Inches: width of a cell, distance between panels, maximum width of all panels."""
_ROW, _LAYERS = (0.09, 0.24), 5.0
"""Inches: minimum and maximum height of a layer, preferred height of all layers together."""
_GAP = 0.4
"""Distance, in cells, between the kinds inside layers and the others."""
_DECADES = 2
"""The colours range from 1 / 10^n to 10^n."""
_TEXT, _TITLE = 7.5, 11
_UNKNOWN = "#B0B0B0"


@dataclass(frozen=True)
class _Grid:
    """The positions of parameters in a panel: kinds in order of appearance, those outside layers last."""

    kinds: tuple[str, ...]
    outside: int
    layers: tuple[int, ...]
    places: dict[str, tuple[int | None, str]]


def heat_map(path: Path, title: str, inspection: Inspection) -> None:
    """Draw the signal-to-noise ratio of every candidate to a file, whose suffix gives the format.

    Raises ValueError if matplotlib is not installed.
    """
    grid = _grid(list(inspection.losses))
    candidates = [name for name in inspection.candidates if name != "elementwise"]
    width = _CELL * (len(grid.kinds) + _GAP) + _PANEL_EDGE
    down = ceil(len(candidates) / max(1, int(_WIDE / width)))
    across = ceil(len(candidates) / down)
    rows = max(1, len(grid.layers))
    row = min(_ROW[1], max(_ROW[0], _LAYERS / rows))
    label = 0.075 * max(map(len, grid.kinds))
    picture = figure(max(6.0, across * width + 1.6), down * (rows * row + label + 0.45) + 0.9)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(-_DECADES, _DECADES), "RdBu")
    panels = picture.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes, candidate in zip(panels, candidates, strict=False):
        losses = {
            name: by_candidate[candidate]
            for name, by_candidate in inspection.losses.items()
            if candidate in by_candidate
        }
        _panel(axes, candidate, grid, losses, colours)
    for axes in panels[len(candidates) :]:
        axes.set_visible(False)
    for axes in panels[::across]:
        axes.set_ylabel("layer" if grid.layers else "", fontsize=_TEXT + 1)
    ticks = range(-_DECADES, _DECADES + 1)
    bar = picture.colorbar(colours, ax=list(panels), ticks=ticks, extend="both", aspect=30, shrink=0.9, pad=0.01)
    bar.ax.set_yticklabels([f"{10.0**tick:g}" for tick in ticks], fontsize=_TEXT + 0.5)
    bar.set_label(f"signal-to-noise ratio (above {THRESHOLD:g}: means represent elements)", fontsize=_TEXT + 1)
    picture.suptitle(title, x=0.01, ha="left", fontsize=_TITLE)
    picture.supxlabel(
        "Hatched: does not apply. Grey: never had a gradient.", x=0.01, ha="left", fontsize=_TEXT, color="#505050"
    )
    save(picture, path)


def _grid(names: list[str]) -> _Grid:
    places: dict[str, tuple[int | None, str]] = {}
    split = {name: _split(name) for name in names}
    stacks = {before for before, layer, _ in split.values() if layer is not None}
    for name, (before, layer, kind) in split.items():
        places[name] = layer, f"{before}.{kind}" if layer is not None and len(stacks) > 1 else kind
    inside = dict.fromkeys(kind for layer, kind in places.values() if layer is not None)
    outside = dict.fromkeys(kind for layer, kind in places.values() if layer is None)
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    return _Grid((*inside, *outside), len(outside), tuple(layers), places)


def _split(name: str) -> tuple[str, int | None, str]:
    """The parts of a name before its first number, the number, and the kind: the rest, with `*` for numbers."""
    parts = name.removesuffix(".weight").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return "", None, ".".join(parts)
    kind = ".".join("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return ".".join(parts[:number]), int(parts[number]), kind


def _panel(axes: Any, candidate: str, grid: _Grid, losses: dict[str, Loss], colours: Any) -> None:
    rows, inside = max(1, len(grid.layers)), len(grid.kinds) - grid.outside
    found: dict[tuple[int | None, str], Loss] = {}
    for name, loss in losses.items():
        found[grid.places[name]] = found.get(grid.places[name], Loss()) + loss
    # Kinds outside layers are set apart, as high as all layers together.
    places = [place + _GAP * (place >= inside > 0) for place in range(len(grid.kinds))]
    axes.set_facecolor("white")
    for place, kind in zip(places, grid.kinds, strict=True):
        column: list[tuple[int | None, float, float]] = [(None, 0, rows)] if place >= inside else []
        column = column or [(layer, number, 1) for number, layer in enumerate(grid.layers)]
        for layer, top, height in column:
            style: dict[str, Any] = {"facecolor": "#F2F2F2", "edgecolor": "#D0D0D0", "hatch": "/////", "linewidth": 0}
            if (layer, kind) in found:
                here = found[layer, kind]
                colour = colours.to_rgba(_decades(here.snr)) if here.known else _UNKNOWN
                style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5 if rows <= 40 else 0.2}
            axes.add_patch(_rectangle((place, top), height, style))
    axes.set_xlim(0, places[-1] + 1)
    axes.set_ylim(rows, 0)
    axes.set_xticks([place + 0.5 for place in places], grid.kinds, rotation=90, fontsize=_TEXT)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if rows / step <= 20)
    shown = [number for number, layer in enumerate(grid.layers) if layer % every == 0]
    axes.set_yticks([number + 0.5 for number in shown], [str(grid.layers[number]) for number in shown], fontsize=_TEXT)
    axes.tick_params(length=0)
    axes.set_title(candidate, fontsize=_TEXT + 2, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


def _rectangle(corner: tuple[float, float], height: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, height, **style)


def _decades(snr: float) -> float:
    return _DECADES if snr == inf else log10(snr)
