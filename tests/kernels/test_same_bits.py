"""An engine gives the same bits on any number of ranks, threads, and at any address; it keeps nothing that grows."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor

from titan_adam_mini.check.engines import (
    ENGINES,
    LAYOUTS,
    ROWS,
    SimulatedRank,
    differing_bits,
    engine_of,
    gradients,
    step,
    world,
)
from titan_adam_mini.kernels import Engine, cpu, loops
from titan_adam_mini.layout import BlockLayout


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        *((engine, {}) for engine in ENGINES),
        ("cpu", {"dtype": torch.bfloat16, "seed": 3}),
        ("cpu", {"dtype": torch.float64}),
        ("cpu", {"momentum": torch.int8}),
    ],
    ids=str,
)
def test_any_number_of_ranks(engine: str, options: dict[str, object]) -> None:
    want = world(engine, 1, **options)
    for ranks in (2, 3, 7):
        got = world(engine, ranks, **options)
        assert not differing_bits(got, want[0]), ranks
        assert all(float(param_step.step) == 3 for simulated in got for param_step in simulated.param_steps)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_gradients_keeps_its_values_and_moves_on_with_the_moments(engine: str) -> None:
    """As the other engine's, to rounding; ranks that share moments have the same."""
    got, want = world(engine, 3, without=1), world("foreach", 3, without=1)
    for mine, other in zip(got, want, strict=True):
        for one, two in zip(mine.param_steps, other.param_steps, strict=True):
            assert torch.equal(one.step, two.step) and torch.equal(one.exp_avg, two.exp_avg), one.name
            torch.testing.assert_close(one.exp_avg_sq, two.exp_avg_sq, rtol=1e-6, atol=0)
            torch.testing.assert_close(one.param, two.param, rtol=1e-6, atol=1e-7)
    norms = [simulated.named("norm").exp_avg_sq for simulated in got]
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])
    everywhere = world(engine, 3)
    assert not torch.equal(everywhere[1].named("norm").param, got[1].named("norm").param)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (want,) = world("cpu", 1)
        torch.set_num_threads(threads)
        (got,) = world("cpu", 1)
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(got.param_steps, want.param_steps, strict=True):
        assert torch.equal(mine.param, other.param) and torch.equal(mine.exp_avg_sq, other.exp_avg_sq), mine.name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_any_address(engine: str, offset: int) -> None:
    def shifted(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x)

    (want,), (got,) = world(engine, 1), world(engine, 1, store=shifted)
    for mine, other in zip(got.param_steps, want.param_steps, strict=True):
        assert torch.equal(mine.param, other.param) and torch.equal(mine.exp_avg_sq, other.exp_avg_sq), mine.name


def test_stored_in_another_order_the_sums_are_the_same() -> None:
    layouts = {"rows": BlockLayout.of((70, 5000), 1, None), "columns": BlockLayout.of((5000, 70), None, 1)}
    layouts["heads of columns"] = BlockLayout.of((5000, 70), None, 7)

    def turned(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    results = []
    for store in (torch.clone, turned):
        simulated = SimulatedRank(layouts, engine_of("cpu"), store=store)
        grads = gradients(layouts, 0, torch.float32)
        simulated.give(dict.fromkeys(layouts, grads["rows"].t()) | {"rows": grads["rows"]})
        step([simulated])
        results.append([param_step.exp_avg_sq.flatten() for param_step in simulated.param_steps])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_nothing_grows_and_replaced_tensors_are_noticed() -> None:
    engine = engine_of("cpu")
    assert isinstance(engine, cpu.CpuEngine)
    simulated, grads = SimulatedRank(ROWS, engine), gradients(ROWS, 0, torch.float32)
    tables = None
    for number in range(20):
        simulated.give(grads)
        if number == 10:
            old = simulated.named("rows").param
            before = old.clone()
            simulated.named("rows").param = old.clone()
        step([simulated])
        tables = tables or list(engine._tables.values())
        assert list(engine._tables.values()) == tables and len(engine._phases) == len(tables)
    assert torch.equal(old, before) and not torch.equal(simulated.named("rows").param, before)
    again = SimulatedRank(ROWS, engine_of("cpu"))
    for _ in range(20):
        again.give(grads)
        step([again])
    assert torch.equal(again.named("rows").param, simulated.named("rows").param)


def test_patterns_of_missing_gradients_do_not_pile_up() -> None:
    engine = engine_of("cpu")
    assert isinstance(engine, cpu.CpuEngine)
    layouts = {str(number): BlockLayout.of((4, 4), 1, None) for number in range(7)}
    simulated = SimulatedRank(layouts, engine)
    for pattern in range(1, 128):
        grads = gradients(layouts, 0, torch.float32)
        simulated.give({name: grad if pattern >> int(name) & 1 else None for name, grad in grads.items()})
        step([simulated])
    assert len(engine._tables) <= 32 and len(engine._phases) <= 32
    assert {int(param_step.step) for param_step in simulated.param_steps} == {64}


def test_a_forked_child_has_threads_of_its_own() -> None:
    """torch's own threads do not survive a fork: the child does nothing but the step, and compares with numpy.

    Second moments by columns are left out, which take torch's operations.
    """
    compiled = {
        param_step.name: param_step.plan.layout
        for param_step in SimulatedRank(ROWS, engine_of("cpu")).param_steps
        if not param_step.by_columns
    }
    mine, want = (SimulatedRank(compiled, engine_of("cpu")) for _ in range(2))
    for simulated in (mine, want):
        simulated.give(gradients(compiled, 0, torch.float32))
    step([want])
    child = os.fork()
    if child == 0:
        step([mine])
        pairs = zip(mine.param_steps, want.param_steps, strict=True)
        os._exit(0 if all((a.param.numpy() == b.param.numpy()).all() for a, b in pairs) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_optimizers_may_step_at_once() -> None:
    results: list[SimulatedRank] = []
    threads = [threading.Thread(target=lambda: results.extend(world("cpu", 1, 5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for other in results[1:]:
        for a, b in zip(results[0].param_steps, other.param_steps, strict=True):
            assert torch.equal(a.param, b.param), a.name


def test_what_cannot_be_compiled_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such machine")

    monkeypatch.setattr(cpu, "_failed", {})
    monkeypatch.setattr(loops, "run", broken)
    with caplog.at_level("INFO", "titan_adam_mini"):
        (got,) = world("cpu", 1)
    (want,) = world("foreach", 1)
    assert all(torch.equal(a.param, b.param) for a, b in zip(got.param_steps, want.param_steps, strict=True))
    (line,) = [record.message for record in caplog.records]
    assert "no such machine" in line and "foreach instead of fused" in line


def test_engines_are_told_apart() -> None:
    """The tests above can fail: the two engines do add in different orders."""

    def total(engine: Engine) -> Tensor:
        simulated = SimulatedRank({"long rows": LAYOUTS["long rows"]}, engine)
        simulated.give(gradients({"long rows": LAYOUTS["long rows"]}, 0, torch.float32))
        step([simulated])
        return simulated.param_steps[0].exp_avg_sq

    assert not torch.equal(total(engine_of("cpu")), total(engine_of("foreach")))
