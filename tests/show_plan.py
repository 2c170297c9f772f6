"""Prints, mesh by mesh, what the plan says and what real ranks hold, and the difference in bytes, all ranks together.

`python tests/show_plan.py`; the models are tiny, 1 to 4 ranks of gloo train a step with every optimizer.
"""

from __future__ import annotations

import tempfile
from typing import Any

from ranks import run
from real_memory import CASES, weigh

from titan_adam_mini.memory.facts import facts, optimizers_of
from titan_adam_mini.memory.plan import _read_run
from titan_adam_mini.tools.isolated_process import in_isolated_process

COLUMNS = ("parameters", "gradients", "adamw fused", "adam_mini_float32", "adam_mini_bfloat16", "adam_mini_int8")


def main() -> None:
    """Every mesh of the catalogue: bytes that are there, and how many the plan is off by."""
    print(f"{'mesh':28}" + "".join(f"{column.removeprefix('adam_'):>22}" for column in (*COLUMNS, "checkpoints")))
    for name, case in CASES.items():
        plan = in_isolated_process(_read_run, case.arguments, case.ranks)
        told, (optimizers, _) = facts(plan), optimizers_of(plan)
        held = [plan.stage_of(rank).memory_of(rank, optimizers, offloaded=plan.offloaded) for rank in range(case.ranks)]
        with tempfile.TemporaryDirectory() as folder:
            real = run(weigh, case.ranks, case, folder, timeout=200)
        cells = []
        for column in COLUMNS:
            there = [one["state"].get(column, one.get(column)) for one in real]
            if None in there:
                cells.append("refused")
                continue
            key = column.split()[0]
            mine = [one.state[key].bytes if key in one.state else getattr(one, key).bytes for one in held]
            cells.append(f"{sum(there):,} {difference(there, mine):+d}")
        stored: dict[str, Any] = real[0]["checkpoint"]
        mine = [told["checkpoint"]["total"][key.split()[0]] for key in stored]
        cells.append(f"{sum(stored.values()):,} {difference(list(stored.values()), mine):+d}")
        print(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def difference(there: list[int], mine: list[int]) -> int:
    """The largest by absolute value, of any rank: errors of two ranks do not cancel."""
    return max((two - one for one, two in zip(there, mine, strict=True)), key=abs)


if __name__ == "__main__":
    main()
