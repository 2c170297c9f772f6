"""Momentum of one type goes on as another, and AdamW's as each of them, through torchtitan's checkpointer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import HALF, WHOLE, Trainer, difference, said
from injected import holdings, together
from meshes import MESHES
from ranks import RankError, run
from torch import Tensor

from titan_adam_mini.check.injected import gradients, values
from titan_adam_mini.check.meshes import Placed, full_shapes, layouts, norms_along_tp
from titan_adam_mini.check.oracle import blocks, error
from titan_adam_mini.kernels import int8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SAVED = 3
SOURCES = ("AdamW", *DTYPES)


@contextmanager
def said_here() -> Iterator[list[str]]:
    """What this rank logs of momentum meanwhile."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "momentum converted" in record.getMessage():
                lines.append(record.getMessage())

    keep, logger = Keep(), logging.getLogger("titan_adam_mini")
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


def manager(placed: Placed, kind: str, sizes: Any, folder: str, load_adamw_state: bool = False) -> Any:
    """torchtitan's checkpointer, ours, around the decoder and its optimizer, as the trainer makes it."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.lr_scheduler import LRSchedulersContainer
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import Checkpoint

    from titan_adam_mini.titan.builder import AdamMiniContainer
    from titan_adam_mini.titan.knobs import Knobs

    if kind == "AdamW":
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "foreach": True}
        container = OptimizersContainer([placed.module], torch.optim.AdamW, options)
    else:
        heads = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
        from titan_adam_mini import AdamMini

        named = list(placed.module.named_parameters())
        optimizer = AdamMini(named, lr=1e-2, betas=(0.9, 0.95), momentum_dtype=DTYPES[kind], **heads)
        container = AdamMiniContainer([placed.module], [optimizer], Knobs(load_adamw_state=load_adamw_state))
    return CheckpointManager(
        dataloader=None,
        model_parts=[placed.module],
        optimizers=container,
        lr_schedulers=LRSchedulersContainer(container, lambda step: 1.0),
        states={},
        checkpoint_config=Checkpoint(enable=True, interval=1, last_save_model_only=False),
        sd_adapter=None,
        base_folder=folder,
    )


def step(placed: Placed, mesh: Any, checkpointer: Any, number: int) -> None:
    placed.inject(gradients(full_shapes(mesh.sizes), number), norms_along_tp(mesh))
    checkpointer.states["optimizer"].step()


def save(rank: int, world: int, name: str, folder: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Train and save with every kind of optimizer."""
    mesh, held = MESHES[name], {}
    for kind in kinds:
        placed = Placed.decoder(mesh, torch.float32).fill(values(full_shapes(mesh.sizes)))
        checkpointer = manager(placed, kind, mesh.sizes, f"{folder}/{kind}")
        for number in range(SAVED):
            step(placed, mesh, checkpointer, number)
        checkpointer.save(SAVED)
        held[kind] = holdings(placed, checkpointer.states["optimizer"].optimizers[0])
    return held


def load(rank: int, world: int, name: str, folder: str, pairs: tuple[tuple[str, str], ...]) -> dict[Any, Any]:
    """Load every (source, momentum_dtype) into a run that has another state, and take a step."""
    mesh, held = MESHES[name], {}
    for source, kind in pairs:
        placed = Placed.decoder(mesh, torch.float32).fill(values(full_shapes(mesh.sizes)))
        checkpointer = manager(placed, kind, mesh.sizes, f"{folder}/{source}", load_adamw_state=source == "AdamW")
        step(placed, mesh, checkpointer, 17)
        with said_here() as lines:
            assert checkpointer.load()
        (optimizer,) = checkpointer.states["optimizer"].optimizers
        state = {key: optimizer.state[param] for key, param in placed.params.items()}
        held[source, kind] = holdings(placed, optimizer) | {
            "lines": lines,
            "dtypes": {key: {k: v.dtype for k, v in one.items()} for key, one in state.items()},
            "saves": sorted(checkpointer.states["optimizer"].state_dict()),
        }
        step(placed, mesh, checkpointer, SAVED)
        held[source, kind]["after"] = holdings(placed, optimizer)
    return held


def kept(momentum: Tensor, kind: str) -> Tensor:
    """What is left of a momentum that is kept in this kind."""
    if kind == "int8" and int8.fits(momentum.shape):
        values, scale = torch.empty_like(momentum, dtype=torch.int8), torch.empty(int8.scale_shape(momentum.shape))
        int8.quantize(momentum.float(), values, scale)
        return int8.dequantized(values, scale)
    return momentum.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


def expected_line(source: str, kind: str, shapes: dict[str, Any]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for shape in shapes.values():
        there, here = (
            "float32" if one == "AdamW" or (one == "int8" and not int8.fits(shape)) else one for one in (source, kind)
        )
        if there != here:
            counts[there, here] = counts.get((there, here), 0) + 1
    told = (f"from {there} to {here} for {count} parameters" for (there, here), count in counts.items())
    return f"AdamMini: momentum converted {', '.join(told)}" if counts else ""


def check(held: dict[str, Any], loaded: list[Any], source: str, kind: str, sizes: Any) -> None:
    shapes = full_shapes(sizes)
    one = together(shapes, [rank[source, kind] for rank in loaded])
    grids = layouts(sizes)
    for name, shape in shapes.items():
        assert torch.equal(one["params"][name], held["params"][name]), name
        assert torch.equal(one["exp_avg"][name], kept(held["exp_avg"][name], kind)), name
        assert one["step"][name] == SAVED
        second = held["exp_avg_sq"][name]
        if source == "AdamW":
            means = [second.double()[block].mean() for block in blocks(grids[name])]
            second = torch.stack(means).view(grids[name].grid_shape)
            assert error(one["exp_avg_sq"][name], second) < 1e-6
        else:
            assert torch.equal(one["exp_avg_sq"][name], second), name
        kept_in = torch.float32 if kind == "int8" and not int8.fits(shape) else DTYPES[kind]
        for rank in loaded:
            want = {"step": torch.float32, "exp_avg": kept_in, "exp_avg_sq": torch.float32}
            want |= {"exp_avg_scale": torch.float32} if kept_in == torch.int8 else {}
            assert rank[source, kind]["dtypes"][name] == want
    line = expected_line(source, kind, shapes)
    assert [rank[source, kind]["lines"] for rank in loaded] == [[line] if line else [], *[[]] * (len(loaded) - 1)]
    after = together(shapes, [rank[source, kind]["after"] for rank in loaded])
    for name in shapes:
        assert after["step"][name] == SAVED + 1 and after["params"][name].isfinite().all()
        assert not torch.equal(after["params"][name], one["params"][name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Any]:
    """What runs on two ranks have saved, by kind."""
    mesh = MESHES["FSDP2 2, even runs"]
    ranks = run(save, 2, mesh.name, str(folder), SOURCES)
    return {kind: together(full_shapes(mesh.sizes), [rank[kind] for rank in ranks]) for kind in SOURCES}


PAIRS = tuple((source, kind) for source in SOURCES for kind in DTYPES)


EACH_ONCE = (("AdamW", "int8"), ("float32", "int8"), ("bfloat16", "float32"), ("int8", "bfloat16"))
"""Every source and every type, a conversion each."""


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        pytest.param("FSDP2 3, even runs", EACH_ONCE, marks=pytest.mark.slow),
        pytest.param("FSDP2 2, even runs", EACH_ONCE, marks=pytest.mark.slow),
        pytest.param("FSDP2 x TP 2x2, even runs", PAIRS, marks=pytest.mark.slow),
    ],
)
def test_every_type_becomes_every_other_on_any_mesh(
    sources: dict[str, Any], folder: Path, name: str, pairs: tuple[tuple[str, str], ...]
) -> None:
    """From two ranks; what is of the same type is the same to the bit, what is not is converted, once, in one line."""
    mesh = MESHES[name]
    loaded = run(load, mesh.world, name, str(folder), pairs)
    for source, kind in pairs:
        check(sources[source], loaded, source, kind, mesh.sizes)
    saves = {kind: loaded[0][source, kind]["saves"] for source, kind in pairs}
    assert all(loaded[0][source, kind]["saves"] == saves[kind] for source, kind in pairs), "room is for the load alone"


@pytest.mark.slow
def test_from_tensor_parallelism_too(tmp_path: Path) -> None:
    mesh, other = MESHES["FSDP2 x TP 2x2, even runs"], MESHES["FSDP2 3, even runs"]
    ranks = run(save, mesh.world, mesh.name, str(tmp_path), ("int8",))
    pairs = tuple(("int8", kind) for kind in DTYPES)
    loaded = run(load, other.world, other.name, str(tmp_path), pairs)
    held = together(full_shapes(mesh.sizes), [rank["int8"] for rank in ranks])
    for source, kind in pairs:
        check(held, loaded, source, kind, mesh.sizes)


def test_int8_of_runs_that_this_mesh_cuts_is_refused_on_every_rank(tmp_path: Path) -> None:
    """No mesh that cuts runs can hold the scales, though its own momentum is float32."""
    run(save, 3, "FSDP2 3, cut runs", str(tmp_path), ("int8",))
    with pytest.raises(RankError) as told:
        run(load, 2, "TP 2, cut runs", str(tmp_path), (("int8", "float32"),), timeout=60)
    assert any(f"rank {both} of 2" in str(told.value) for both in ([0, 1], [1, 0])), "the same words on both"
    assert "has int8 momentum for 'layers.0.feed_forward.w2.weight'" in str(told.value)
    assert "mesh axis 'tp' (of 2) cuts dim 1, of 384 columns, at 192" in str(told.value)


@pytest.mark.nightly
def test_the_trainer_goes_on_with_another_type(even: Trainer) -> None:
    """int8 from the configuration: the same losses after a restart, and close ones after a change of type."""
    knob = "optimizer.adam_mini.momentum_dtype"
    small = even("int8", ranks=2, data=2, **WHOLE, **{knob: "int8"})
    again = even.resume("int8", **WHOLE, **{knob: "int8"})
    assert difference(again, small, first=HALF + 1) == 0
    assert not any("momentum converted" in line for line in again.lines)
    start = {"checkpoint.initial_load_path": even.checkpoint("int8", HALF), "checkpoint.initial_load_model_only": False}
    other = even("int8_as_bfloat16", ranks=2, data=2, start=start, **{knob: "bfloat16"})
    assert said(other, r"momentum converted (from int8 to bfloat16 for \d+ parameters)")
    assert 0 < difference(other, small, first=HALF + 1) < 0.05
