"""The plan's bytes are those that real ranks hold after a step: parameters, gradients, every optimizer's state,
padding, rounding, and what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run
from real_memory import CASES, weigh

from titan_adam_mini.memory.facts import facts, optimizers_of
from titan_adam_mini.memory.plan import _read_run
from titan_adam_mini.tools.isolated_process import in_isolated_process

REPEATED = (
    *("one rank", "FSDP2 2", "FSDP2 3", "FSDP2 x TP 2x2", "FSDP2 x TP 2x2, factored", "PP 2"),
    *("MoE, FSDP2 3", "MoE, EP 2", "MoE, FSDP2 x EP 2x2, factored"),
)
"""Whose parts are in other cases, alone or together."""


def tiered(name: str) -> Any:
    marks = pytest.mark.nightly if name in REPEATED else pytest.mark.slow
    return pytest.param(name, marks=marks)


def planned_as(key: str) -> str:
    """The plan has one AdamW: its engines keep the same."""
    return key.split()[0]


@pytest.mark.parametrize("name", map(tiered, CASES))
def test_to_the_byte(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plan = in_isolated_process(_read_run, case.arguments, case.ranks, False)
    told = facts(plan)
    real = run(weigh, case.ranks, case, str(tmp_path), timeout=200)
    optimizers, _ = optimizers_of(plan)
    for rank, held in enumerate(real):
        mine = plan.stage_of(rank).memory_of(rank, optimizers, offloaded=plan.offloaded)
        assert (mine.parameters.bytes, mine.gradients.bytes) == (held["parameters"], held["gradients"]), rank
        assert mine.buffers.bytes == held["buffers"]
        assert mine.parameters.bytes + mine.parameters.padding == held["parameters padded"]
        # With CPU offload a gradient is copied out of FSDP's buffer if that is on a GPU; here it stays in it.
        if case.forward and not plan.offloaded:
            assert mine.gradients.bytes + mine.gradients.padding == held["gradients padded"]
        if not plan.offloaded:
            assert mine.parameters.rounding == held["parameters rounded"]
            assert mine.gradients.rounding == held["gradients rounded"] or not case.forward
        assert {key: mine.state[planned_as(key)].bytes for key in held["state"]} == held["state"], rank
    assert list(told["refused"]) == ([] if case.int8 else ["adam_mini_int8"])
    for key, stored in real[0]["checkpoint"].items():
        assert told["checkpoint"]["total"][planned_as(key)] == stored, key
    for key in real[0]["second moments"]:
        blocks: dict[str, int] = {}
        for held in real:
            blocks |= held["second moments"][key]
        assert sum(blocks.values()) == told["second_moments_adamw" if key.startswith("adamw") else "second_moments"]
    assert set(real[0]["checkpoint"]) == set(case.optimizers)


@pytest.mark.slow
def test_the_cases_are_nasty() -> None:
    """Padding, empty shards, cut heads and straddling blocks are there to be got wrong."""
    seen: dict[str, Any] = {
        name: facts(in_isolated_process(_read_run, CASES[name].arguments, CASES[name].ranks, False))
        for name in ("FSDP2 4", "FSDP2 3", "PP 2", "MoE, EP 2")
    }
    four = seen["FSDP2 4"]
    assert four["ranks"]["smallest"]["rank"] == 3 and four["ranks"]["smallest"]["parameters"]["padding"] > 0
    assert sum(row["straddling"] for row in seen["FSDP2 3"]["patterns"] if row["role"] in ("query", "key")) > 0
    assert seen["PP 2"]["ranks"]["largest"]["stage"] != seen["PP 2"]["ranks"]["smallest"]["stage"]
    assert "efsdp" in seen["MoE, EP 2"]["mesh"]["experts"]
