"""Peaks of simulated runs: one run, the largest stage of a pipeline, and the searches of `estimate --fit`.

Simulations import torchtitan, so they run in separate processes.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from ..momentum import TYPES
from ..tools.isolated_process import IsolatedProcess, in_isolated_process, isolated_process
from .fit import BATCH, GPUS, LIMITS, SEQUENCE, Found, fewest, largest

if TYPE_CHECKING:
    from .simulate import Simulated

PAIR = ("AdamW", "AdamMini")
MOMENTA = tuple(f"AdamMini {name}" for name in TYPES)
MODES = ("none", "selective", "full")
"""The modes of activation checkpointing that `--fit` tries; "selective" with the configuration's option."""


def simulated(call: IsolatedProcess, arguments: list[str], ngpu: int, rank: int | None) -> Simulated:
    """The run as configured, with AdamW and AdamMini with every type of momentum; checked against the plan.

    Args:
        call: calls a function in another process.
        arguments: torchtitan's command line.
        ngpu: number of ranks.
        rank: the rank to simulate; None for the first of the pipeline stage that needs most memory.
    """
    return _largest(call, _simulate_checked, arguments, ngpu, rank, (*PAIR, *MOMENTA))


def fits(
    run: Simulated, arguments: list[str], questions: Sequence[str], budget: int, rank: int | None, progress: Progress
) -> list[Fit]:
    """What fits in `budget` bytes, for every mode of checkpointing, each searched in a separate process."""
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(len(MODES)))
        searches = [
            _Search(stack.enter_context(isolated_process()), run, arguments, mode, budget, rank, progress)
            for mode in MODES
        ]
        found = list(threads.map(lambda search: [search.answer(question) for question in questions], searches))
    return [fit for fits in found for answers in fits for fit in answers]


@dataclass(frozen=True)
class Fit:
    """One answer of `--fit`.

    Attributes:
        question: "local batch", "sequence" or "GPUs".
        checkpointing: mode of activation checkpointing.
        optimizer: "AdamW" or "AdamMini".
        found: the answer.
    """

    question: str
    checkpointing: str
    optimizer: str
    found: Found


@dataclass
class _Search:
    """Simulations with one mode of checkpointing; none is repeated."""

    call: IsolatedProcess
    run: Simulated
    arguments: list[str]
    mode: str
    budget: int
    rank: int | None
    progress: Progress
    seen: dict[tuple[str, int], Simulated] = field(default_factory=dict)

    def answer(self, question: str) -> list[Fit]:
        """The answers for both optimizers."""
        mesh = self.run.mesh
        others = math.prod(degree for axis, degree in mesh.items() if axis not in ("dp_shard", "etp"))
        unit = {
            BATCH: self.run.batch_unit,
            SEQUENCE: math.lcm(self.run.seq_divisor, 1024 if self.run.seq_len >= 2048 else 128),
            GPUS: others,
        }
        start = {BATCH: self.run.batch, SEQUENCE: self.run.seq_len, GPUS: self.run.ngpu}
        search = fewest if question == GPUS else largest
        return [
            Fit(
                question,
                self.mode,
                name,
                search(self._peak(question, name), self.budget, unit[question], start[question], LIMITS[question]),
            )
            for name in PAIR
        ]

    def _peak(self, question: str, name: str) -> Callable[[int], int]:
        return lambda value: self._simulated(question, value).peak(name).total

    def _simulated(self, question: str, value: int) -> Simulated:
        if (question, value) not in self.seen:
            flags = ["--activation_checkpoint.mode", self.mode, "--training.global_batch_size", "-1"]
            ngpu = self.run.ngpu
            if question == BATCH:
                flags += ["--training.local_batch_size", str(value)]
            elif question == SEQUENCE:
                flags += ["--training.seq_len", str(value)]
            else:
                flags += ["--parallelism.data_parallel_shard_degree", "-1"]
                ngpu = value
            task = self.progress.add_task(f"checkpointing {self.mode}: {question} {value:,}", total=None)
            arguments = [*self.arguments, *flags]
            run = _largest(self.call, _simulate, arguments, ngpu, self.rank, PAIR, self.run.passes)
            self.seen[question, value] = run
            self.progress.remove_task(task)
        return self.seen[question, value]


def _simulate_checked(arguments: list[str], ngpu: int, *args: Any) -> Any:
    _quiet()
    from ..offline.build import configured
    from .simulate import simulate_checked

    os.dup2(2, 1)  # torchtitan's output must not mix with the command's
    return simulate_checked(configured(arguments, ngpu), ngpu, *args)


def _simulate(arguments: list[str], ngpu: int, *args: Any) -> Any:
    _quiet()
    from ..offline.build import configured
    from .simulate import simulate

    return simulate(configured(arguments, ngpu), ngpu, *args)


def _quiet() -> None:
    # torchtitan logs every model that it builds, and this builds dozens.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _largest(
    call: IsolatedProcess, simulate: Any, arguments: list[str], ngpu: int, rank: int | None, *more: Any
) -> Simulated:
    """A simulation of one rank, or, if `rank` is None, of the first rank of the pipeline stage that needs most memory.

    Each stage after the first runs in a separate process: torch caches what it derives from a mesh, and would give one
    rank the coordinate of another.
    """
    first = call(simulate, arguments, ngpu, rank or 0, *more)
    stages = first.mesh.get("pp", 1) if rank is None else 1
    ranks = [stage * ngpu // stages for stage in range(1, stages)]
    others = [in_isolated_process(simulate, arguments, ngpu, first_rank, *more) for first_rank in ranks]
    return max([first, *others], key=lambda run: run.peak(PAIR[0]).total)
