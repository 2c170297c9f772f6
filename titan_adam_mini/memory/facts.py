"""Everything that the plan of a run contains: refusals, the bytes of all ranks, checkpoint size, the verdict.

`facts` returns a dictionary for JSON; all numbers in it are integers, bytes unless stated otherwise:

    model, ngpu                  name and flavor; number of ranks
    mesh                         name of a mesh -> axis -> size: `dense`, and `experts` where they have their own
    parameters, frozen           elements of the full model; of these, without gradient
    second_moments               second-moment entries of the full model with AdamMini
    second_moments_adamw         and with AdamW: one per trainable element
    configured                   the key, among those of `optimizers`, of AdamMini with the configured momentum
    optimizers                   key -> title: `adamw`, `adam_mini_float32`, `adam_mini_bfloat16`, `adam_mini_int8`, and
                                 `adam_mini_own` if momentum has the parameters' dtype, and that is none of these
    refused                      key -> why this optimizer cannot run on this mesh; its bytes are null everywhere
    offloaded                    whether parameters, gradients and state are in host memory
                                 (`training.enable_cpu_offload`)
    step_on_device               whether `step`, four bytes per parameter, is on the accelerator: with `implementation`
                                 "fused" it is (AdamMini's: if Triton can be imported), else in host memory
    notes                        sentences about what is not counted
    patterns                     one entry per kind of trainable parameter, numbers in names collapsed to *:
        pattern, shape, placements, role, layout, decay
        parameters               how many there are in the model
        blocks                   of one of them
        local_bytes              of all of them, each on the first rank of its pipeline stage
        straddling               how many of them have blocks on several ranks there
        exchanged_bytes          bytes that this rank contributes to AdamMini's exchange per step
    ranks                        `largest`, `smallest` (by parameters, gradients, buffers and AdamW's state; the first
                                 of equals) and `first`, rank 0:
        rank, stage              its number, and that of its pipeline stage
        parameters, gradients, buffers, state[key]
                                 each {bytes, padding, rounding}: see `offline/rank_memory.py`
    all_ranks                    the sum of `bytes` over all ranks: parameters, gradients, buffers, state[key]
    checkpoint                   every tensor of model and optimizer once: model, optimizer[key], total[key]; without
                                 the data loader's position, the schedule, group settings, metadata and file headers
    verdict                      about the largest rank, AdamW against `configured`:
        saved_bytes              of optimizer state
        sequence_bytes           an estimate of the memory of one more sequence (see `activations`), or null
        sequence_unknown         why it is null; else ""
        further_sequences        how many more sequences fit into the savings, or null
        worth_it                 a boolean: the savings are a GiB or more, or fit a sequence
        sentence                 the verdict in words
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import torch

from ..offline.checks import check, refusal
from ..offline.rank_memory import ADAMW, Kind, Optimizer, Param, RankMemory, Run, optimizers_of
from ..partition import summarize
from ..plan import BlockPlan, bytes_in, grids_of, plan_buffers

WORTH = 2**30
"""Bytes per GPU: saving less than this, of the tens of GiB that a GPU has, changes no setting."""


def facts(run: Run) -> dict[str, Any]:
    """Everything that the plan of a run contains; see the head of this file.

    Raises:
        ValueError: the configured momentum, checkpoints, or the model itself are not possible on this mesh.
    """
    optimizers, configured = optimizers_of(run)
    check(run, optimizers[configured])
    reasons = {key: refusal(run, one) for key, one in optimizers.items()}
    refused = {key: why for key, why in reasons.items() if why}
    counted = {key: one for key, one in optimizers.items() if key not in refused}
    ranks, all_ranks = _ranks(run, counted)
    trained = [param for param in run.params.values() if param.blocks]
    total = run.parameters
    checkpoint = {key: run.checkpoint_bytes(one) for key, one in counted.items()}
    plan: dict[str, Any] = {
        "model": run.model,
        "ngpu": run.ngpu,
        "mesh": run.meshes,
        "parameters": total,
        "frozen": total - sum(prod(param.kind.shape) for param in trained),
        "second_moments": sum(param.blocks.second_moments for param in trained if param.blocks),
        "second_moments_adamw": sum(prod(param.kind.shape) for param in trained),
        "configured": configured,
        "optimizers": {key: optimizer.title for key, optimizer in optimizers.items()},
        "refused": refused,
        "offloaded": run.offloaded,
        "notes": list(run.notes),
        "step_on_device": run.fused and not run.offloaded,
        "patterns": _patterns(run),
        "ranks": {which: _rank(run, memory, optimizers) for which, memory in ranks.items()},
        "all_ranks": {**all_ranks, "state": {key: all_ranks["state"].get(key) for key in optimizers}},
        "checkpoint": {
            "model": run.model_checkpoint,
            "optimizer": {key: checkpoint.get(key) for key in optimizers},
            "total": {key: run.model_checkpoint + checkpoint[key] if key in checkpoint else None for key in optimizers},
        },
    }
    return {**plan, "verdict": _verdict(run, plan)}


# Ranks


def _ranks(run: Run, optimizers: dict[str, Optimizer]) -> tuple[dict[str, RankMemory], dict[str, Any]]:
    """The largest, the smallest and the first rank, and the sums of `bytes` over all ranks."""
    largest = smallest = first = None
    total, state = Counter[str](), Counter[str]()
    for stage in run.stages:
        for rank in stage.ranks:
            found = stage.memory_of(rank, optimizers, offloaded=run.offloaded)
            first = first or found
            largest = found if largest is None or _size(found) > _size(largest) else largest
            smallest = found if smallest is None or _size(found) < _size(smallest) else smallest
            for name in ("parameters", "gradients", "buffers"):
                total[name] += getattr(found, name).bytes
            state.update({key: memory.bytes for key, memory in found.state.items()})
    assert largest and smallest and first
    return {"largest": largest, "smallest": smallest, "first": first}, {**total, "state": dict(state)}


def _size(found: RankMemory) -> int:
    return sum(memory.bytes for memory in (found.parameters, found.gradients, found.buffers, found.state[ADAMW]))


def _rank(run: Run, found: RankMemory, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "stage": run.stages.index(run.stage_of(found.rank)),
        **{name: asdict(getattr(found, name)) for name in ("parameters", "gradients", "buffers")},
        "state": {key: asdict(found.state[key]) if key in found.state else None for key in optimizers},
    }


# Patterns


def _patterns(run: Run) -> list[dict[str, Any]]:
    """One entry per kind of parameter; see the head of this file."""
    rows = []
    seen = _on_first_ranks(run)
    by_placements: dict[str, list[Param]] = {}
    for param in run.params.values():
        by_placements.setdefault(_placements(param.kind), []).append(param)
    for placements, params in by_placements.items():
        for row in summarize(param.blocks for param in params if param.blocks):
            local, straddling, sent = (
                sum(numbers) for numbers in zip(*(seen[name] for name in row.names), strict=True)
            )
            rows.append(
                {
                    "pattern": row.pattern,
                    "parameters": len(row.names),
                    "shape": list(row.shape),
                    "placements": placements,
                    "role": row.role,
                    "blocks": row.second_moments,
                    "layout": row.cuts,
                    "decay": row.decay,
                    "local_bytes": local,
                    "straddling": straddling,
                    "exchanged_bytes": sent,
                }
            )
    order = {name: number for number, name in enumerate(run.params)}
    firsts = {row["pattern"]: order.get(row["pattern"], 0) for row in rows}
    return sorted(rows, key=lambda row: firsts[row["pattern"]])


def _on_first_ranks(run: Run) -> dict[str, tuple[int, int, int]]:
    """Parameter -> on the first rank of its stage: local bytes, whether its blocks straddle, bytes exchanged."""
    seen: dict[str, tuple[int, int, int]] = {}
    for stage in run.stages:
        rank = stage.ranks[0]
        for part in stage.parts:
            params = [param for param in part if param.blocks]
            plans = [_block_plans(param, rank) for param in params]
            grids = grids_of(plans)
            axes = [param.kind.mesh.axes(rank) for param in params]
            widths = [8 if param.kind.dtype == torch.float64 else 4 for param in params]
            sent = bytes_in(plan_buffers(grids, axes), grids, widths)
            for number, (param, own) in enumerate(zip(params, plans, strict=True)):
                local = prod(stop - start for start, stop in own[0].shard.box()) * param.kind.dtype.itemsize
                seen[param.name] = (local, int(any(plan.axes for plan in own)), sent.get(number, 0))
    return seen


def _block_plans(param: Param, rank: int) -> list[BlockPlan]:
    shard = param.kind.shard(param.kind.mesh.coordinate(rank))
    return [BlockPlan.of(layout, shard) for layout in param.kind.layouts]


def _placements(kind: Kind) -> str:
    pairs = zip(kind.mesh.names, kind.placements, strict=True)
    return ", ".join(f"{axis} {placement}" for axis, placement in pairs) or "whole"


# Verdict


def _verdict(run: Run, plan: Mapping[str, Any]) -> dict[str, Any]:
    configured = plan["configured"]
    state = plan["ranks"]["largest"]["state"]
    before, after = state[ADAMW]["bytes"], state[configured]["bytes"]
    saved = before - after
    unknown = run.sequence if isinstance(run.sequence, str) else ""
    sequence = run.sequence if isinstance(run.sequence, int) else None
    further = None if sequence is None or run.offloaded else max(0, saved // max(1, sequence))
    worth = saved >= WORTH or bool(further)
    where = "of host memory per rank" if run.offloaded else "per GPU"
    if worth:
        words = f"saves {_from_to(before, after)} of optimizer state {where}: "
        if further:
            words += f"enough for local batch {run.batch + further} instead of {run.batch} (an estimate)"
        elif sequence is not None and not run.offloaded:
            words += (
                f"worth it for memory, but not enough for local batch {run.batch + 1}: one more sequence of "
                f"{run.seq_len:,} tokens takes about {size(sequence)} (an estimate)"
            )
        else:
            words += "worth it for memory"
    else:
        words = f"saves {size(saved)} {where} at this sharding: not worth it for memory"
    total = plan["checkpoint"]["total"]
    words += f"; checkpoints shrink {_from_to(total[ADAMW], total[configured], _DECIMAL)}"
    return {
        "saved_bytes": saved,
        "sequence_bytes": sequence,
        "sequence_unknown": unknown,
        "further_sequences": further,
        "worth_it": worth,
        "sentence": f"{plan['optimizers'][configured]}: {words}.",
    }


_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_DECIMAL = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def _from_to(before: int, after: int, units: Sequence[tuple[int, str]] = _BINARY) -> str:
    """Two numbers of bytes as text, in one unit, with enough digits for the smaller."""
    unit, name = next(unit for unit in units if before >= unit[0] or unit[0] == 1)
    digits = 0 if after >= 20 * unit or unit == 1 else 1 if after >= unit else 2
    return f"{before / unit:,.{digits}f} -> {after / unit:,.{digits}f} {name}"


def size(number: int) -> str:
    """A number of bytes as text."""
    unit, name = next(unit for unit in _BINARY if abs(number) >= unit[0] or unit[0] == 1)
    return f"{number / unit:,.{0 if abs(number) >= 20 * unit or unit == 1 else 1}f} {name}"
