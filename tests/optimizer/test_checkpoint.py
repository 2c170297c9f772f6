"""Saved on one mesh, loaded on another: what was saved is loaded to the bit, and the run goes on as without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injected import on_one_device
from meshes import CATALOGUE
from ranks import RankError
from resharding import PAIRS, STEPS, moved

from titan_adam_mini.check.oracle import error
from titan_adam_mini.state import SECOND_MOMENTS

KINDS = ("params", "exp_avg", *SECOND_MOMENTS)
FAST = {("PP 2", "FSDP2 3"), ("FSDP2 x TP 2x2, even", "FSDP2 3, even")}
SLOW = {
    *(("FSDP2 2", "FSDP2 5"), ("FSDP2 2", "one rank"), ("FSDP2 8", "FSDP2 2"), ("FSDP2 2, CPU offload", "FSDP2 2")),
    *(("HSDP 2x3", "FSDP2 3"), ("FSDP2 3, even", "FSDP2 x TP 2x2, even"), ("FSDP2 7", "FSDP2 x TP 2x3")),
    *(("TP 3", "FSDP2 x TP 2x2, norms on dp"), ("EP 2", "FSDP2 4, experts"), ("PP x FSDP2 x TP 2x2x2", "FSDP2 2")),
}


def marked(pair: tuple[str, str]) -> Any:
    """What is neither in FAST nor in SLOW is for the night."""
    marks = () if pair in FAST else pytest.mark.slow if pair in SLOW else pytest.mark.nightly
    return pytest.param(*pair, id=" -> ".join(pair), marks=marks)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [marked(pair) for pair in PAIRS])
def test_between_meshes(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    saved, loaded, after = moved(saved_on, loaded_on, torch.float64, tmp_path)
    for kind in (*KINDS, "step"):
        for key, value in saved[kind].items():
            same = torch.equal(loaded[kind][key], value) if kind != "step" else loaded[kind][key] == value
            assert same, (kind, key)
    want = on_one_device(CATALOGUE[loaded_on].sizes, steps=STEPS)
    for kind in KINDS:
        assert max((error(after[kind][key], value) for key, value in want[kind].items()), default=0) < 1e-12, kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "second_moment"),
    [("FSDP2 7", "HSDP 2x2", "factored"), ("HSDP 2x3", "FSDP2 3", "blocks")],
)
def test_fsdp_to_fsdp_has_the_bits_of_a_run_without_a_break(
    saved_on: str, loaded_on: str, second_moment: str, tmp_path: Path
) -> None:
    *_, after = moved(saved_on, loaded_on, torch.float32, tmp_path, second_moment=second_moment)
    want = on_one_device(CATALOGUE[loaded_on].sizes, dtype=torch.float32, steps=STEPS, second_moment=second_moment)
    for kind in KINDS:
        for key, value in want[kind].items():
            assert after[kind][key].dtype == value.dtype and torch.equal(after[kind][key], value), (kind, key)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        pytest.param("FSDP2 3, even", "FSDP2 x TP 2x2, even", marks=pytest.mark.slow),
        ("FSDP2 x EP 2x2", "EP 2"),
    ],
)
def test_factored_moves_to_other_kinds_of_mesh(saved_on: str, loaded_on: str, tmp_path: Path) -> None:
    saved, loaded, after = moved(saved_on, loaded_on, torch.float64, tmp_path, second_moment="factored")
    want = on_one_device(CATALOGUE[loaded_on].sizes, steps=STEPS, second_moment="factored")
    for kind in KINDS:
        assert want[kind] and all(torch.equal(loaded[kind][key], value) for key, value in saved[kind].items()), kind
        assert max(error(after[kind][key], value) for key, value in want[kind].items()) < 1e-12, kind


@pytest.mark.slow
def test_nested_state_dicts_serve_as_well(tmp_path: Path) -> None:
    saved, loaded, after = moved("HSDP 2x2", "FSDP2 3", torch.float32, tmp_path, False, second_moment="factored")
    want = on_one_device(CATALOGUE["FSDP2 3"].sizes, dtype=torch.float32, steps=STEPS, second_moment="factored")
    for kind in KINDS:
        assert all(torch.equal(loaded[kind][key], value) for key, value in saved[kind].items()), kind
        assert all(torch.equal(after[kind][key], value) for key, value in want[kind].items()), kind


@pytest.mark.slow
def test_what_torch_would_mix_up_is_refused(tmp_path: Path) -> None:
    """17 rows over tensor parallelism of 2 and FSDP of 4: torch saves them wrongly, and loads them without a word."""
    with pytest.raises(RankError, match=r"would mix up the rows of .*feed_forward.w1.weight.*\(17, 10\)"):
        moved("FSDP2 x TP 4x2", "FSDP2 x TP 4x2", torch.float32, tmp_path)
