"""The plan that `facts` returns, as tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..offline.rank_memory import ROUNDING
from .facts import size

WIDTH = 200


def show(plan: dict[str, Any], console: Console) -> None:
    """Print a plan."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    meshes = [
        " x ".join(f"{axis} {degree}" for axis, degree in mesh.items()) + f" ({name})"
        for name, mesh in plan["mesh"].items()
    ]
    frozen = f", {plan['frozen']:,} of them frozen" if plan["frozen"] else ""
    lines = [
        f"{plan['model']} ({plan['config']}) on {plan['ngpu']:,} ranks: {'; '.join(meshes)}",
        f"{plan['parameters']:,} parameters{frozen}; second moments: AdamW {plan['second_moments_adamw']:,}, AdamMini "
        f"{plan['second_moments']:,}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_patterns(plan))
    console.print(_ranks(plan))
    for line in _notes(plan):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_checkpoint(plan))
    console.print(plan["verdict"]["sentence"], soft_wrap=True, highlight=False, style="bold")


def _patterns(plan: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = (
        "pattern",
        "n",
        "shape",
        "placements",
        "role",
        "blocks",
        "decay",
        "local bytes",
        "straddling",
        "bytes/step",
    )
    right = ("n", "local bytes", "bytes/step")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in plan["patterns"]:
        n, straddling = row["parameters"], row["straddling"]
        table.add_row(
            row["pattern"],
            str(n),
            "x".join(map(str, row["shape"])),
            row["placements"],
            row["role"],
            f"{row['blocks']:,} ({row['layout']})",
            "yes" if row["decay"] else "no",
            f"{row['local_bytes']:,}",
            "no" if not straddling else "yes" if straddling == n else f"{straddling} of {n}",
            f"{row['exchanged_bytes']:,}",
        )
    total = {key: sum(row[key] for row in plan["patterns"]) for key in ("parameters", "local_bytes", "exchanged_bytes")}
    table.add_section()
    table.add_row(
        "total" if plan["mesh"]["dense"]["pp"] == 1 else "total, one rank of every stage",
        *(str(total["parameters"]), "", "", "", f"{plan['second_moments']:,}", ""),
        *(f"{total['local_bytes']:,}", "", f"{total['exchanged_bytes']:,}"),
    )
    return table


def _ranks(plan: dict[str, Any]) -> Table:
    """Largest, smallest and first rank; a rank that is several of them appears once."""
    labels: dict[int, list[str]] = {}
    for which, rank_facts in plan["ranks"].items():
        labels.setdefault(rank_facts["rank"], []).append(which)
    by_rank = {rank_facts["rank"]: rank_facts for rank_facts in plan["ranks"].values()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "", "bytes", "+ FSDP's padding", "+ allocator's rounding", "total"):
        table.add_column(column, justify="left" if column in ("rank", "") else "right")
    for rank, names in labels.items():
        rank_facts = by_rank[rank]
        words = " and ".join("" if name == "first" else name for name in names if name != "first" or len(names) == 1)
        label = f"{rank} ({words})" if words else f"{rank}"
        rows = {name: rank_facts[name] for name in ("parameters", "gradients", "buffers")}
        rows |= {plan["optimizers"][key]: rank_facts["state"][key] for key in plan["optimizers"]}
        table.add_section()
        for number, (name, memory) in enumerate(rows.items()):
            if memory is None:
                table.add_row("", name, "refused", "", "", "")
                continue
            cells = [f"{memory[key]:,}" for key in ("bytes", "padding", "rounding")]
            table.add_row("" if number else label, name, *cells, size(sum(memory.values())))
    return table


def _notes(plan: dict[str, Any]) -> list[str]:
    where = "on the device" if plan["step_on_device"] else "in host memory, where nothing is rounded"
    notes = [
        f"Bytes are local elements x bytes per element. State includes step, 4 bytes per parameter, {where}. "
        f"Rounding: a tensor on a GPU takes a multiple of {ROUNDING} bytes; memory that the allocator reserves beyond "
        "that is not counted."
    ]
    if plan["offloaded"]:
        notes.append(
            "Parameters, gradients and state are in host memory, not on the GPU (training.enable_cpu_offload)."
        )
    notes += plan["notes"]
    notes += [f"{plan['optimizers'][key]}: refused, because {why}" for key, why in plan["refused"].items()]
    return notes


def _checkpoint(plan: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("checkpoint")
    for column in ("model", "optimizer", "bytes", ""):
        table.add_column(column, justify="right")
    saved = plan["checkpoint"]
    for key, title in plan["optimizers"].items():
        if saved["total"][key] is not None:
            total = saved["total"][key]
            cells = (saved["model"], saved["optimizer"][key], total)
            table.add_row(title, *(f"{cell:,}" for cell in cells), f"{total / 1e9:,.1f} GB")
    table.caption = "Every tensor once; without the data loader's position, schedule, settings and file headers."
    return table
