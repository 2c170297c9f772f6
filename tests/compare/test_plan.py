"""Which runs are wanted: the best learning rate is inside what was tried, where that can be had."""

import math
from collections.abc import Callable

from titan_adam_mini.compare.plan import EXTENSIONS, Plan, Run, at_edge


def done(plan: Plan, loss: Callable[[Run], float]) -> dict[Run, float]:
    """The losses of everything that the plan ever wants."""
    losses: dict[Run, float] = {}
    while wanted := plan.remaining(losses):
        assert not losses.keys() & set(wanted)
        losses |= {run: loss(run) for run in wanted}
    return losses


def bowl(best: float) -> Callable[[Run], float]:
    return lambda run: math.log(run.lr / best) ** 2


def test_without_a_sweep_every_seed_at_the_configurations_rate() -> None:
    plan = Plan({"AdamW": 1e-3, "AdamMini": 2e-3}, [], 2)
    runs = [Run("AdamW", 1e-3, 0), Run("AdamMini", 2e-3, 0), Run("AdamW", 1e-3, 1), Run("AdamMini", 2e-3, 1)]
    assert plan.remaining({}) == runs, "all variants with a seed before any with the next"
    assert plan.expected({}) == 4
    assert plan.remaining(dict.fromkeys(runs[:1], 2.0)) == runs[1:]
    assert plan.remaining(dict.fromkeys(runs, 2.0)) == []


def test_other_seeds_wait_for_the_best_rate() -> None:
    plan = Plan({"AdamW": 1.0}, [1e-3, 2e-3, 4e-3], 3)
    swept = [Run("AdamW", lr, 0) for lr in (1e-3, 2e-3, 4e-3)]
    assert plan.remaining({}) == swept
    losses = dict(zip(swept, (2.0, 1.5, 1.9), strict=True))
    assert plan.remaining(dict(list(losses.items())[:2])) == swept[2:]
    assert plan.remaining(losses) == [Run("AdamW", 2e-3, 1), Run("AdamW", 2e-3, 2)]
    assert plan.expected(losses) == 5


def test_a_best_rate_at_an_edge_moves_the_edge() -> None:
    plan = Plan({"AdamW": 1.0}, [1e-3, 3e-3], 1)
    assert sorted(run.lr for run in done(plan, bowl(2.5e-2))) == [1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2]
    assert plan.sweep("AdamW", done(plan, bowl(2.5e-2)))[1] == 2.7e-2
    down = done(plan, bowl(1.1e-4))
    assert sorted(run.lr for run in down) == [3.7e-5, 1.11e-4, 3.33e-4, 1e-3, 3e-3]
    assert plan.sweep("AdamW", down)[1] == 1.11e-4


def test_one_rate_is_both_edges() -> None:
    plan = Plan({"AdamW": 1.0}, [1e-3], 1)
    assert sorted(run.lr for run in done(plan, bowl(1e-3))) == [5e-4, 1e-3, 2e-3]
    assert max(run.lr for run in done(plan, lambda run: math.inf)) == 1e-3, "no larger one where it diverged"


def test_every_variant_has_a_sweep_of_its_own() -> None:
    plan = Plan({"AdamW": 1.0, "AdamMini": 1.0}, [1e-3, 2e-3, 4e-3], 2)
    losses = done(plan, lambda run: bowl(8e-3 if run.variant == "AdamMini" else 2e-3)(run))
    assert plan.sweep("AdamW", losses) == ([1e-3, 2e-3, 4e-3], 2e-3)
    assert plan.sweep("AdamMini", losses) == ([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 8e-3)
    assert {run for run in losses if run.seed == 1} == {Run("AdamW", 2e-3, 1), Run("AdamMini", 8e-3, 1)}
    assert plan.expected(losses) == len(losses)


def test_runs_that_diverged_are_worst_and_extensions_end() -> None:
    plan = Plan({"AdamW": 1.0}, [1e-3, 2e-3], 1)
    losses = done(plan, lambda run: math.inf if run.lr > 1e-3 else 2.0 + run.lr)
    assert min(losses, key=lambda run: run.lr).lr == 6.25e-5, "down, four times"
    swept, best = plan.sweep("AdamW", losses)
    assert len(swept) == 2 + EXTENSIONS and best == swept[0] and at_edge(swept, best)
    losses = done(plan, lambda run: math.inf)
    assert plan.sweep("AdamW", losses)[1] == 6.25e-5, "smaller rates are tried where all diverge"
    assert not at_edge([1.0, 2.0, 3.0], 2.0)
