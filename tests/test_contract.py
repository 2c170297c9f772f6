"""What AdamMini promises, one promise per test. Read this first; every folder beside it tests one part in depth.

The model is a tiny Llama (`decoder.py`) whose sizes divide by nothing: 6 query heads of 7 rows, so that 4, 5 and 7
ranks cut through heads. Ranks are real processes on gloo (`ranks.py`). Gradients are set by hand, equal in all runs
(`injected.py`). The reference is Algorithm 3 of arXiv 2406.16793, block by block in float64 (`oracle.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injected import agreed, errors, on_mesh, on_one_device
from meshes import MESHES, RUNS
from ranks import run
from resharding import moved
from stored_runs import group_of, partition, saved
from torch import Tensor
from torch.nn import Parameter

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.injected import EPS, gradients, groups, make, oracle, set_lr, values
from titan_adam_mini.check.meshes import DENSE, Placed, full_shapes, layouts, norms_along_tp
from titan_adam_mini.check.oracle import blocks, error
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.convert.convert import Conversion, convert

STEPS = 6
SHAPES = full_shapes(DENSE)


# 1. Sharding never changes the result


@pytest.mark.parametrize("mesh", ["one rank", "FSDP2 5", "HSDP 2x2", "FSDP2 x TP 2x2", "PP x FSDP2 2x2"])
def test_every_mesh_gives_the_result_of_one_device(mesh: str) -> None:
    """Parameters, momentum and second moments are those of the paper's algorithm on whole tensors, to rounding."""
    got, _ = on_mesh(mesh, dtype=torch.float64, steps=STEPS)
    assert max(errors(got, oracle(DENSE, STEPS)).values()) < 1e-12


# 2. The same bits on any number of FSDP ranks


@pytest.mark.parametrize("mesh", ["FSDP2 2", "FSDP2 3", "FSDP2 7", "HSDP 2x3"])
def test_fsdp_of_any_size_gives_the_bits_of_one_device(mesh: str) -> None:
    """For equal gradients. What FSDP adds is the rounding of its reduce-scatter, as with any optimizer."""
    got, _ = on_mesh(mesh, dtype=torch.float32, steps=STEPS)
    want = on_one_device(DENSE, dtype=torch.float32, steps=STEPS)
    for key in ("params", "exp_avg", "exp_avg_sq", "step"):
        assert all(torch.equal(torch.as_tensor(got[key][name]), want[key][name]) for name in SHAPES), key


# 3. Save anywhere, load anywhere


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("FSDP2 2", "FSDP2 4"), ("FSDP2 4", "one rank")])
def test_a_run_goes_on_on_another_mesh_as_if_nothing_had_happened(
    saved_on: str, loaded_on: str, tmp_path: Path
) -> None:
    """Three steps, torch.distributed.checkpoint, another number of ranks, three steps: the bits of six steps."""
    before, loaded, after = moved(saved_on, loaded_on, torch.float32, tmp_path)
    want = on_one_device(DENSE, dtype=torch.float32, steps=6)
    for key in ("params", "exp_avg", "exp_avg_sq", "step"):
        for name in SHAPES:
            assert torch.equal(torch.as_tensor(loaded[key][name]), torch.as_tensor(before[key][name])), (key, name)
            assert torch.equal(torch.as_tensor(after[key][name]), want[key][name]), (key, name)


# 4. From AdamW, and back


def test_a_run_changes_from_adamw_to_adam_mini_and_back(tmp_path: Path) -> None:
    """Momentum and step stay. A block has the mean of AdamW's second moments; on the way back, all its elements do."""
    source = saved(tmp_path, "AdamW", mesh="FSDP2 2")
    cut = partition().assign(SHAPES)
    for start, to, kind in ((source, "adam_mini", "AdamMini"), (tmp_path / "adam_mini", "adamw", "AdamW")):
        convert(Conversion(Stored(start), to, cut, group_of(kind)), tmp_path / to)
    old, mini, back = (Stored(path) for path in (source, tmp_path / "adam_mini", tmp_path / "adamw"))
    for name in SHAPES:
        state = f"optimizer.state.{name}"
        for kept in ("exp_avg", "step"):
            assert torch.equal(mini.value(f"{state}.{kept}"), old.value(f"{state}.{kept}"))
            assert torch.equal(back.value(f"{state}.{kept}"), old.value(f"{state}.{kept}"))
        means = mini.value(f"{state}.exp_avg_sq").flatten()
        for block, mean in zip(blocks(layouts(DENSE)[name]), means, strict=True):
            torch.testing.assert_close(mean, old.value(f"{state}.exp_avg_sq")[block].mean(), rtol=1e-6, atol=0)
            assert (back.value(f"{state}.exp_avg_sq")[block] == mean).all()


# 5. Half of AdamW's state


@pytest.mark.parametrize(("momentum_dtype", "share"), [(None, 0.51), (torch.bfloat16, 0.26), (torch.int8, 0.14)])
def test_the_state_is_half_of_adamws(momentum_dtype: torch.dtype | None, share: float) -> None:
    """4 bytes per float32 parameter instead of 8, and less with a smaller momentum; matrices are 128 wide here."""
    params = {name: Parameter(torch.zeros(shape)) for name, shape in full_shapes(RUNS).items() if shape[-1] % 128 == 0}
    adamw = torch.optim.AdamW(params.values())
    mini = AdamMini(params.items(), partition=partition(RUNS), momentum_dtype=momentum_dtype)
    sizes = []
    for optimizer in (adamw, mini):
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert sizes[1] < share * sizes[0]


# 6. AdamW's hyper-parameters mean what they mean in AdamW


def test_with_elementwise_blocks_it_is_adamw() -> None:
    """Blocks are the only difference: learning rate, betas, eps, decay, groups and schedule carry over unchanged."""
    runs: list[dict[str, Parameter]] = []
    elementwise = Partition.transformer(roles={"*": "bias"})
    for kind in ("AdamW", "AdamMini"):
        params = {name: Parameter(value) for name, value in values(SHAPES).items()}
        optimizer = (
            torch.optim.AdamW(groups(params), eps=EPS)
            if kind == "AdamW"
            else AdamMini(groups(params), eps=EPS, partition=elementwise)
        )
        for step in range(STEPS):
            for name, grad in gradients(SHAPES, step).items():
                params[name].grad = grad
            set_lr(optimizer, step)
            optimizer.step()
        runs.append(params)
    assert max(error(runs[1][name].detach(), runs[0][name].detach()) for name in SHAPES) < 1e-14


# 7. A missing gradient stops nobody


def with_gaps(rank: int, world: int, mesh: str) -> dict[str, Any]:
    """Step 0: rank 0 has no gradient at all. Step 1: every rank lacks others. Step 2: nobody has any. Then all do."""
    placed = Placed.decoder(MESHES[mesh]).fill(values(SHAPES))
    optimizer = make("AdamMini", placed.params, DENSE)
    for step in range(4):
        grads: dict[str, Tensor | None] = dict(gradients(SHAPES, step))
        for number, name in enumerate(SHAPES):
            if (step == 0 and rank == 0) or (step == 1 and number % world == rank) or step == 2:
                grads[name] = None
        placed.inject(grads, norms_along_tp(MESHES[mesh]))
        optimizer.step()
    state = {name: optimizer.state[param] for name, param in placed.params.items()}
    whole = {name: one["exp_avg_sq"].full_tensor() for name, one in state.items()}
    return {"exp_avg_sq": whole, "step": {name: float(one["step"]) for name, one in state.items()}}


@pytest.mark.parametrize("mesh", ["FSDP2 3", "FSDP2 5", "TP 3"])
def test_missing_gradients_hang_nobody_and_ranks_stay_in_step(mesh: str) -> None:
    """Ranks that share a parameter keep the same second moments and step; where no rank has a gradient, nothing moves.

    Replicas that exchange nothing leave a parameter alone each by itself, as with AdamW (docs/limits.md).
    """
    ranks = run(with_gaps, MESHES[mesh].world, mesh, timeout=60)
    steps = agreed([one["step"] for one in ranks])  # asserts that all ranks have the same
    moments = agreed([one["exp_avg_sq"] for one in ranks])
    assert set(steps.values()) == {3.0}
    assert all(bool(moment.isfinite().all()) for moment in moments.values())
