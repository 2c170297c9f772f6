"""An interrupted step: no helper thread has addresses any more when the exception is on its way."""

from __future__ import annotations

import _thread
import threading
import time
from typing import Any

import pytest
import torch

from titan_adam_mini.check.engines import SimulatedRank, engine_of, gradients, step
from titan_adam_mini.kernels import cpu
from titan_adam_mini.layout import BlockLayout

LAYOUTS = {"w": BlockLayout.of((600, 512), 1, None)}
"""Enough for several threads."""


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Helpers take a while; `at_work["caller"]` is what the caller does in the meantime, `at_work["helper"]` what
    the first helper does once that is over."""
    if torch.get_num_threads() < 2:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert cpu._compiled(torch.float32) is None
    state: dict[str, Any] = {"started": 0, "ended": 0, "caller": lambda: None, "helper": lambda: None}
    lock, main = threading.Lock(), threading.current_thread()

    def run_units(*arguments: Any) -> None:
        if threading.current_thread() is main:
            while state["started"] == 0:
                time.sleep(0.01)
            state["caller"]()
            return
        with lock:
            state["started"] += 1
            first = state["started"] == 1
        time.sleep(0.3)
        if first:
            state["helper"]()
            time.sleep(0.1)
        with lock:
            state["ended"] += 1

    monkeypatch.setattr(cpu, "_run_units", run_units)
    return state


def interrupted() -> None:
    raise KeyboardInterrupt


def failed() -> None:
    raise MemoryError


def interrupted_for_real() -> None:
    """Ctrl-C now; the helper sends another while it is waited for."""
    _thread.interrupt_main()
    time.sleep(60)


@pytest.mark.parametrize("what", [interrupted, failed, interrupted_for_real])
def test_helpers_have_ended_when_the_exception_arrives(what: Any, at_work: dict[str, Any]) -> None:
    engine = engine_of("cpu")
    simulated = SimulatedRank(LAYOUTS, engine)
    simulated.give(gradients(LAYOUTS, 0, torch.float32))
    at_work["caller"] = what
    if what is interrupted_for_real:
        at_work["helper"] = _thread.interrupt_main
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        engine.update(simulated.param_steps)
    assert at_work["started"] == at_work["ended"] > 0


def test_an_error_of_a_helper_waits_for_the_others_and_later_steps_have_helpers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu._compiled(torch.float32) is None
    ended, real, main = [], cpu._run_units, threading.current_thread()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    turn = iter([True, False])

    def run_units(*arguments: Any) -> None:
        if threading.current_thread() is not main:
            if next(turn):
                raise RuntimeError("broken")
            time.sleep(0.2)
            ended.append(True)

    monkeypatch.setattr(cpu, "_run_units", run_units)
    two = [SimulatedRank(LAYOUTS, engine_of("cpu")) for _ in range(2)]
    for simulated in two:
        simulated.give(gradients(LAYOUTS, 0, torch.float32))
    with pytest.raises(RuntimeError, match="broken"):
        two[0].engine.update(two[0].param_steps)
    assert ended == [True]
    monkeypatch.setattr(cpu, "_run_units", real)
    step([two[1]])
    assert not torch.equal(two[1].param_steps[0].param, two[0].param_steps[0].param)
