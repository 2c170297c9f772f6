"""Real training on every mesh: torch's own forward, backward and clipping, against the float64 oracle over some steps.

The oracle is fed by an unsharded copy of the decoder that sees all ranks' data, so its gradients never pass through
any parallelism. Every case here runs its forward and backward pass for real, on gloo and the CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from ranks import run
from training import CASES, train

LIMIT = 1e-12
FAST = {"FSDP2 3, CPU offload", "TP 2", "MoE, FSDP2 2, experts Shard(1)", "PP 2"}
SLOW = {
    *("FSDP2 8, empty shards", "HSDP 2x3", "TP 3", "TP 2, plain norms", "FSDP2 x TP 3x2"),
    *("FSDP2 x TP 2x2, norms on dp", "MoE, FSDP2 x EP 2x2", "PP x FSDP2 2x2"),
}
# Collectives per step and mesh axis: one for Partial gradients where there are any, one where blocks straddle.
PER_STEP: dict[str, dict[str, int]] = {
    **{name: {"dp": 1} for name in CASES if name.startswith(("FSDP2", "HSDP", "MoE, FSDP2", "PP x FSDP2"))},
    **{name: {"dp": 1, "tp": 1} for name in CASES if "x TP" in name},
    **{name: {"tp": 2} for name in CASES if name.startswith("TP")},
    "TP 2, plain norms": {"tp": 1},
    "FSDP2 1": {},
    "MoE, EP 2": {},
    "PP 2": {},
}


def marked(name: str) -> Any:
    """The case; what is neither in FAST nor in SLOW is for the night."""
    marks = () if name in FAST else pytest.mark.slow if name in SLOW else pytest.mark.nightly
    return pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_training_equals_the_oracle(name: str) -> None:
    """Parameters, both moments and the gradients' norm; the collectives of a step, and of the first with its checks."""
    case = CASES[name]
    results = run(train, case.world, case, 20 if name == "FSDP2 7" else 4, timeout=300)
    worst = {key: max(result["errors"][key] for result in results) for key in results[0]["errors"]}
    assert all(value < LIMIT for value in worst.values()), worst
    for rank, result in enumerate(results):
        assert all(op == "allreduce" and rank in ranks for op, ranks, _ in result["later"])
        counts = Counter(ranks for _, ranks, _ in result["later"])
        assert sorted(counts.values()) == sorted(PER_STEP[name].values()), result["later"]
        groups = {ranks for _, ranks, _ in result["first"]}
        checks = [ranks for _, ranks, numel in result["first"] if numel == 2]
        assert sorted(checks) == sorted(groups), "one check of the plan per group"


@pytest.mark.slow
def test_the_reference_engine_trains_as_well() -> None:
    """The for-loop engine, on a mesh that cuts rows and columns."""
    for result in run(train_for_loop, CASES["FSDP2 x TP 2x2"].world):
        assert max(result["errors"].values()) < LIMIT


def train_for_loop(rank: int, world: int) -> dict[str, Any]:
    return train(rank, world, CASES["FSDP2 x TP 2x2"], 5, foreach=False)
