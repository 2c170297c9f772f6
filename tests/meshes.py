"""The catalogue of meshes that the tests go through, and full tensors from what their ranks hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from titan_adam_mini.check.decoder import Sizes
from titan_adam_mini.check.meshes import DENSE, Mesh, Part

MOE = replace(DENSE, layers=1, experts=5)
MOE_EVEN = replace(MOE, dim=12, hidden=18)
"""FSDP2 cuts evenly along any dim but the first."""
EVEN = Sizes(vocab=32, dim=12, layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24)
"""Heads are still cut by FSDP2 over 3 and 4, but rows divide by 2 x 2: torch's checkpoints need that with TP."""
RUNS = Sizes(vocab=29, dim=128, layers=1, n_heads=6, n_kv_heads=3, head_dim=7, hidden=256)
"""Momentum is int8 but for `wo`, whose columns do not fill runs, and the norms; heads are cut, rows come out uneven."""
EVEN_RUNS = Sizes(vocab=32, dim=128, layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=256)
"""The same with rows that divide by 2 x 2."""
CUT_RUNS = replace(RUNS, hidden=384)
"""Tensor parallelism of 2 cuts the columns of `w2` at 192, inside a run."""


def _catalogue() -> dict[str, Mesh]:
    meshes = [
        Mesh("one rank", (1,), ("dp",)),
        *(Mesh(f"FSDP2 {n}", (n,), ("dp",)) for n in (2, 3, 4, 5, 7, 8)),
        Mesh("FSDP2 2, CPU offload", (2,), ("dp",), offload=True),
        *(Mesh(f"HSDP {a}x{b}", (a, b), ("rep", "dp")) for a, b in ((2, 2), (2, 3), (3, 2), (2, 1))),
        *(Mesh(f"TP {n}", (n,), ("tp",), partial=True) for n in (2, 3, 4)),
        Mesh("TP 2, plain norms", (2,), ("tp",), norms="plain"),
        *(Mesh(f"FSDP2 x TP {a}x{b}", (a, b), ("dp", "tp")) for a, b in ((2, 2), (3, 2), (2, 3), (4, 2))),
        Mesh("FSDP2 x TP 2x2, norms on dp", (2, 2), ("dp", "tp"), norms="plain"),
        Mesh("HSDP x TP 2x2x2", (2, 2, 2), ("rep", "dp", "tp")),
        Mesh("FSDP2 4, experts", (4,), ("dp",), sizes=MOE),
        Mesh("FSDP2 3, experts Shard(1)", (3,), ("dp",), sizes=MOE_EVEN, expert_dim=1),
        Mesh("EP 2", (2,), ("ep",), sizes=MOE),
        Mesh("FSDP2 x EP 2x2", (2, 2), ("dp", "ep"), sizes=MOE),
        Mesh("FSDP2 x EP 3x2", (3, 2), ("dp", "ep"), sizes=MOE),
        Mesh("FSDP2 x EP 2x2, experts Shard(1)", (2, 2), ("dp", "ep"), sizes=MOE_EVEN, expert_dim=1),
        Mesh("FSDP2 3, even", (3,), ("dp",), sizes=EVEN),
        Mesh("FSDP2 x TP 2x2, even", (2, 2), ("dp", "tp"), sizes=EVEN),
        Mesh("PP 2", (2,), ("pp",)),
        Mesh("PP x FSDP2 2x2", (2, 2), ("pp", "dp")),
        Mesh("PP x FSDP2 x TP 2x2x2", (2, 2, 2), ("pp", "dp", "tp")),
    ]
    return {mesh.name: mesh for mesh in meshes}


CATALOGUE = _catalogue()
WITH_RUNS = {
    f"{name}, {word}": replace(CATALOGUE[name], name=f"{name}, {word}", sizes=sizes)
    for names, word, sizes in (
        (("one rank", *(f"FSDP2 {n}" for n in (2, 3, 4, 7)), "HSDP 2x2", "HSDP 2x3"), "runs", RUNS),
        (("TP 2", "FSDP2 x TP 2x2", "FSDP2 x TP 3x2"), "runs", RUNS),
        (("FSDP2 2", "FSDP2 3", "FSDP2 x TP 2x2"), "even runs", EVEN_RUNS),
        (("FSDP2 3", "TP 2", "FSDP2 x TP 2x2", "HSDP x TP 2x2x2"), "cut runs", CUT_RUNS),
    )
    for name in names
}
"""Some of these meshes with decoders for int8 momentum."""
MESHES = CATALOGUE | WITH_RUNS


def whole(shapes: Mapping[str, Sequence[int]], ranks: Sequence[Mapping[str, Part]]) -> dict[str, Tensor]:
    """Full tensors from what all ranks hold. Asserts that nothing is missing and that replicas are bit-equal."""
    tensors = {}
    for name, shape in shapes.items():
        held = [parts[name] for parts in ranks if name in parts]
        assert held, f"no rank has {name}"
        full = torch.zeros(prod(shape), dtype=held[0][1].dtype)
        seen = torch.zeros(prod(shape), dtype=torch.bool)
        for index, value in held:
            index, value = index.flatten(), value.flatten()
            again = seen[index]
            assert torch.equal(full[index][again], value[again]), f"replicas of {name} differ"
            full[index], seen[index] = value, True
        assert seen.all(), f"nobody has {int((~seen).sum())} elements of {name}"
        tensors[name] = full.view(tuple(shape))
    return tensors
