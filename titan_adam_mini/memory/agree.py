"""A simulated step held against the plan's arithmetic: optimizer state must have the same bytes both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from titan_adam_mini.memory.holdings import Optimizer
from titan_adam_mini.memory.simulate import Simulated, simulate
from titan_adam_mini.memory.stages import read_run
from titan_adam_mini.momentum import TYPES


def simulate_checked(arguments: list[str], ngpu: int, rank: int, optimizers: Sequence[str]) -> Simulated:
    """`simulate`, held against the plan: a run that could not start is refused before, and every optimizer's state must
    have the bytes that the plan's arithmetic gives it.

    Raises:
        ValueError: the run could not start, or the two disagree.
    """
    plan = read_run(arguments, ngpu, sequence=False)
    run = simulate(arguments, ngpu, rank, optimizers)
    counted = {name: _counted(name, plan.momentum) for name in run.peaks}
    held = plan.stage_of(rank).held(rank, counted).state
    for name, peaks in run.peaks.items():
        for peak in peaks:
            if peak.held["optimizer state"] != held[name].bytes:
                raise ValueError(
                    f"the simulation of rank {rank} records {peak.held['optimizer state']:,} bytes of {name}'s state, "
                    f"and the plan counts {held[name].bytes:,}: one of them is wrong, so neither is shown. Please "
                    "report it with the configuration"
                )
    return run


def _counted(name: str, configured: torch.dtype | None) -> Optimizer:
    """An optimizer of the simulation as the plan counts it."""
    mini, _, momentum = name.partition(" ")
    return Optimizer(name, mini=mini == "AdamMini", momentum=TYPES.get(momentum, configured))
