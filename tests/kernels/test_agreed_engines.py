"""Ranks that would compute with different engines, and so add in different orders: refused on all at the start."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from titan_adam_mini import AdamMini, kernels

DEADLINE = 60


def unlike(what: str) -> Any:
    """What makes a rank's engine another one."""
    from titan_adam_mini.kernels import cpu

    if what == "numba is missing":
        return mock.patch.dict(sys.modules, {"titan_adam_mini.kernels.cpu": None})
    if what == "another version":
        return mock.patch.object(cpu.CpuEngine, "version", "fused, torch 2.13.0, numba 0.1.0, llvmlite 0.1.0")
    if what == "no compiler":
        return mock.patch.object(cpu, "_failed", {torch.float32: "numba cannot compile its loops (no such machine)"})
    return mock.patch.object(cpu, "_failed", cpu._failed)


def planned(rank: int, world: int, what: str, straddles: bool) -> str:
    mesh = init_device_mesh("cpu", (world,))
    place = Shard(0) if straddles else Replicate()
    whole = distribute_tensor(torch.ones(12, 6), mesh, [place], src_data_rank=None)
    with unlike(what if rank == world - 1 else "like the others"):
        try:
            AdamMini([("layers.0.wq.weight", torch.nn.Parameter(whole))], n_heads=3).init_state()
        except ValueError as error:
            return str(error)
        return "no error"


@pytest.mark.parametrize("straddles", [True, False])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("numba is missing", "foreach, torch"),
        ("another version", "numba 0.1.0"),
        ("no compiler", "no such machine"),
        ("nothing", ""),
    ],
)
def test_engines_that_differ_raise_on_every_rank(what: str, words: str, straddles: bool) -> None:
    """Also where replicas alone would drift apart."""
    texts = run(planned, 2, what, straddles, timeout=DEADLINE)
    if what == "nothing":
        assert texts == ["no error", "no error"]
        return
    for text in texts:
        assert "plans differ between ranks (0, 1)" in text and "same engine" in text, text
    assert words in texts[1] and words not in texts[0] and "fused, torch" in texts[0]


def test_an_engine_says_what_its_results_depend_on() -> None:
    import llvmlite
    import numba

    engine, _ = kernels.choose(None, None, False, torch.device("cpu"))
    assert all(module.__version__ in engine.version for module in (torch, numba, llvmlite))
    plain, _ = kernels.choose(True, None, False, torch.device("cpu"))
    slow, _ = kernels.choose(False, None, False, torch.device("cpu"))
    assert len({engine.version, plain.version, slow.version}) == 3


def test_a_kernel_that_fails_in_a_step_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is agreed on stays: a failure on one rank ends that rank instead of letting it add in another order."""
    optimizer = AdamMini([("w1.weight", torch.nn.Parameter(torch.ones(4, 4)))])
    optimizer.init_state()

    def broken(*_: object) -> None:
        raise RuntimeError("no such machine")

    monkeypatch.setattr("titan_adam_mini.kernels.cpu.loops.run", broken)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="no such machine"):
        optimizer.step()
