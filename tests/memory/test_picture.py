"""Pictures: every category has a colour, figures stand where there is room for them, and an error is a sentence."""

import sys
from pathlib import Path

import pytest

from titan_adam_mini.memory.picture import CATEGORIES, GIB, _number, stacked_bars


def words(path: Path) -> list[str]:
    """The texts of an svg whose letters are kept as text."""
    import re

    return re.findall(r"<text [^>]*>([^<]+)</text>", path.read_text())


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def test_what_stands_in_a_picture(tmp_path: Path) -> None:
    bars = [
        ("8 GPUs\nAdamW", {"parameters": 10 * GIB, "optimizer state": 20 * GIB, "other": GIB // 10, "gradients": 0}),
        ("8 GPUs\nAdamMini", {"parameters": 10 * GIB, "optimizer state": 10 * GIB}),
    ]
    stacked_bars(tmp_path / "a.svg", "Title", bars, budget=25 * GIB, note="A note.")
    told = words(tmp_path / "a.svg")
    for one in ("Title", "A note.", "GiB", "AdamW", "AdamMini", "30.1", "20.0", "25.0 GiB", "parameters", "other"):
        assert one in told, one
    assert told.count("10.0") == 3, "two segments of parameters, one of state"
    assert "0.100" not in told, "no room for a figure there"
    assert "gradients" not in told, "zero everywhere"


def test_every_category_is_drawn_in_a_colour_of_its_own(tmp_path: Path) -> None:
    assert len(set(CATEGORIES.values())) == len(CATEGORIES)
    stacked_bars(tmp_path / "a.png", "All", [("one", dict.fromkeys(CATEGORIES, GIB))])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no colour for weights: categories are parameters, gradients"):
        stacked_bars(tmp_path / "a.png", "", [("one", {"weights": 1})])
    with pytest.raises(ValueError, match="not supported"):
        stacked_bars(tmp_path / "a.txt", "", [("one", {"other": 1})])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'titan-adam-mini\[titan\]'"):
        stacked_bars(tmp_path / "a.png", "", [("one", {"other": 1})])


def test_three_digits_count() -> None:
    shown = {53.92: "53.9", 4.021: "4.02", 0.05842: "0.0584", 812.3: "812", 1.0: "1.00", 0: "0"}
    assert {gib: _number(gib) for gib in shown} == shown
