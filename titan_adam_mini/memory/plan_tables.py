"""A plan, as `facts` gives it, as tables for reading."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..offline.holdings import ROUNDING
from .facts import size

WIDTH = 200


def show(told: dict[str, Any], console: Console) -> None:
    """Print a plan."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    meshes = [
        " x ".join(f"{axis} {degree}" for axis, degree in mesh.items()) + f" ({name})"
        for name, mesh in told["mesh"].items()
    ]
    frozen = f", {told['frozen']:,} of them frozen" if told["frozen"] else ""
    lines = [
        f"{told['model']} ({told['config']}) on {told['ngpu']:,} ranks: {'; '.join(meshes)}",
        f"{told['parameters']:,} parameters{frozen}; second moments: AdamW {told['second_moments_adamw']:,}, AdamMini "
        f"{told['second_moments']:,}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_patterns(told))
    console.print(_ranks(told))
    for line in _notes(told):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_checkpoint(told))
    console.print(told["verdict"]["sentence"], soft_wrap=True, highlight=False, style="bold")


def _patterns(told: dict[str, Any]) -> Table:
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
    for row in told["patterns"]:
        n, cut = row["parameters"], row["straddling"]
        table.add_row(
            row["pattern"],
            str(n),
            "x".join(map(str, row["shape"])),
            row["placements"],
            row["role"],
            f"{row['blocks']:,} ({row['layout']})",
            "yes" if row["decay"] else "no",
            f"{row['local_bytes']:,}",
            "no" if not cut else "yes" if cut == n else f"{cut} of {n}",
            f"{row['exchanged_bytes']:,}",
        )
    total = {key: sum(row[key] for row in told["patterns"]) for key in ("parameters", "local_bytes", "exchanged_bytes")}
    table.add_section()
    table.add_row(
        "total" if told["mesh"]["dense"]["pp"] == 1 else "total, one rank of every stage",
        *(str(total["parameters"]), "", "", "", f"{told['second_moments']:,}", ""),
        *(f"{total['local_bytes']:,}", "", f"{total['exchanged_bytes']:,}"),
    )
    return table


def _ranks(told: dict[str, Any]) -> Table:
    """Largest, smallest and first rank, those that are the same one once."""
    named: dict[int, list[str]] = {}
    for which, one in told["ranks"].items():
        named.setdefault(one["rank"], []).append(which)
    by_rank = {one["rank"]: one for one in told["ranks"].values()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "", "bytes", "+ FSDP's padding", "+ allocator's rounding", "together"):
        table.add_column(column, justify="left" if column in ("rank", "") else "right")
    for rank, names in named.items():
        one = by_rank[rank]
        words = " and ".join("" if name == "first" else name for name in names if name != "first" or len(names) == 1)
        label = f"{rank} ({words})" if words else f"{rank}"
        rows = {name: one[name] for name in ("parameters", "gradients", "buffers")}
        rows |= {told["optimizers"][key]: one["state"][key] for key in told["optimizers"]}
        table.add_section()
        for number, (name, held) in enumerate(rows.items()):
            if held is None:
                table.add_row("", name, "refused", "", "", "")
                continue
            cells = [f"{held[key]:,}" for key in ("bytes", "padding", "rounding")]
            table.add_row("" if number else label, name, *cells, size(sum(held.values())))
    return table


def _notes(told: dict[str, Any]) -> list[str]:
    where = "on the device" if told["step_on_device"] else "in host memory, where nothing is rounded"
    notes = [
        f"Bytes are local elements x bytes per element. State includes step, 4 bytes per parameter, {where}. "
        f"Rounding: a tensor on a GPU takes a multiple of {ROUNDING} bytes; what the allocator has in reserve is not "
        "counted."
    ]
    if told["offloaded"]:
        notes.append(
            "Parameters, gradients and state are in host memory, not on the GPU (training.enable_cpu_offload)."
        )
    notes += told["notes"]
    notes += [f"{told['optimizers'][key]}: refused, because {why}" for key, why in told["refused"].items()]
    return notes


def _checkpoint(told: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("checkpoint")
    for column in ("model", "optimizer", "bytes", ""):
        table.add_column(column, justify="right")
    saved = told["checkpoint"]
    for key, title in told["optimizers"].items():
        if saved["total"][key] is not None:
            total = saved["total"][key]
            cells = (saved["model"], saved["optimizer"][key], total)
            table.add_row(title, *(f"{cell:,}" for cell in cells), f"{total / 1e9:,.1f} GB")
    table.caption = "Every tensor once; not the data's positions, schedule, settings and file headers."
    return table
