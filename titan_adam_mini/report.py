"""The start-up table: role and blocks of every parameter, and the communication they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .exchange import Item, bytes_exchanged
from .partition import Blocks, summarize
from .partition.roles import HEADED, TRANSPOSED
from .plan import BufferPlan

NO_GRADIENT = (
    "AdamMini: step() found no gradient on any parameter, now or before: nothing is trained. If the optimizer was "
    "built before fully_shard or another wrapper replaced the model's parameters, build it afterwards. Otherwise "
    "check whether gradients are cleared before step()."
)
HEADINGS = ("pattern", "n", "shape", "role", "blocks", "decay", "straddling", "bytes/step")


def table(blocks: Mapping[str, Blocks], items: Sequence[Item], buffers: Sequence[BufferPlan]) -> str:
    """A row per kind of parameter and a row of totals; `bytes/step` is what this rank exchanges."""
    index = {blocks[item.name].name: number for number, item in enumerate(items)}
    cost = bytes_exchanged(items, buffers)
    rows = [HEADINGS]
    for row in summarize(blocks[item.name] for item in items):
        members = [index[name] for name in row.names]
        cut = sum(items[number].straddles for number in members)
        straddling = "no" if not cut else "yes" if cut == len(members) else f"{cut} of {len(members)}"
        spent = sum(cost.get(number, 0) for number in members)
        shape = "x".join(map(str, row.shape))
        layout, decay = f"{row.second_moments:,} ({row.cuts})", "yes" if row.decay else "no"
        rows.append((row.pattern, str(len(members)), shape, row.role, layout, decay, straddling, f"{spent:,}"))
    total = sum(blocks[item.name].second_moments for item in items)
    cut = sum(item.straddles for item in items)
    rows.append(("total", str(len(items)), "", "", f"{total:,}", "", str(cut), f"{sum(cost.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    right = (1, 7)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def exchange_summary(blocks: Mapping[str, Blocks], items: Sequence[Item], buffers: Sequence[BufferPlan]) -> str:
    """One line: how much straddles, and the bytes exchanged for it."""
    return (
        f"{sum(item.straddles for item in items)} of {len(items)} parameters have blocks on more than one rank, "
        f"{heads_cut(blocks, items)} heads cut, "
        f"{sum(bytes_exchanged(items, buffers).values()):,} bytes exchanged per step"
    )


def heads_cut(blocks: Mapping[str, Blocks], items: Sequence[Item]) -> int:
    """Number of query and key heads that lie on more than one rank, over all parameters."""
    total = 0
    for item in items:
        role = blocks[item.name].role
        if role.removesuffix(TRANSPOSED) not in HEADED or blocks[item.name].factors:
            continue
        plan = item.plans[0]
        dim = 0 if role.removesuffix(TRANSPOSED) == role else len(plan.layout.dims) - 1
        tiles = plan.layout.dims[dim]
        starts, lengths = tiles.starts(), tiles.lengths()
        edges = {stop for _, stop in plan.shard.pieces(dim) if 0 < stop < tiles.size}
        cut = {tiles.tile_of(edge) for edge in edges.difference(starts)}
        total += sum(lengths[tile] == lengths[0] for tile in cut)
    return total
