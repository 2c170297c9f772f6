"""Llama 3 8B at its real numbers of ranks: the plan against optimizers that were really made on ranks of such worlds.

A process is the first, a middle or the last rank of a fake process group. torchtitan shards the model there on
the meta device; AdamW and AdamMini make their state of tensors of those local shapes, without memory behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from titan_adam_mini.memory.facts import facts, optimizers_of
from titan_adam_mini.memory.plan import _read_run
from titan_adam_mini.offline.rank_memory import Run
from titan_adam_mini.tools.isolated_process import in_isolated_process

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "llama3_8b.toml"
KNOWN = {(8, 0): 4_015_130_624, (512, 0): 62_752_800, (1024, 0): 31_392_784, (1024, 1023): 27_264_016}
"""Parameter bytes under FSDP2 alone, counted by hand before there was a plan: (ranks, rank)."""
LAYERS = 4
"""Of the model that is looked at outside the nightly tier: all layers are alike, and a pipeline has one per stage."""
MESHES = {
    "FSDP2": {},
    "HSDP": {"data_parallel_replicate": 4},
    "FSDP2 x TP": {"tensor_parallel": 8},
    "PP": {"pipeline_parallel": 4},
}


def arguments(mesh: str, short: bool = False) -> list[str]:
    words = ["--job.config_file", str(CONFIG), "--training.local_batch_size", "4"]
    if short:
        words += ["--experimental.custom_import", "small_flavors", "--model.flavor", "8B_short"]
    for name, degree in MESHES[mesh].items():
        words += [f"--parallelism.{name}_degree", str(degree)]
    return words


def really_made(words: list[str], ngpu: int, rank: int) -> dict[str, Any]:
    """Bytes of parameters, and of the state that each optimizer made of them, on one rank of `ngpu`.

    One rank per process: torch keeps what it derived from a mesh, and equal meshes of other ranks would find it.
    """
    from titan_adam_mini.offline.build import built, configured

    config = configured(words, ngpu)
    with built(config, ngpu, rank) as model:
        return _made(model.parts, model.dims, config)


def _made(parts: list[Any], dims: Any, config: Any) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor import DTensor

    from titan_adam_mini.exchange.item import Channel
    from titan_adam_mini.titan.builder import optimizer_of

    def weigh(tensors: Any) -> int:
        locals_ = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
        return sum(one.numel() * one.element_size() for one in locals_)

    state: dict[str, int] = {}
    local = {
        param: tuple((param.to_local() if isinstance(param, DTensor) else param).shape)
        for part in parts
        for param in part.parameters()
    }
    # What the ranks of a group agree on, they would be asked for here, by tensors without values.
    agreed = mock.patch.object(Channel, "max", lambda self, values: values)
    with FakeTensorMode(), agreed:
        for part in parts:
            for module in part.modules():
                for name, param in list(module.named_parameters(recurse=False)):
                    module._parameters[name] = torch.nn.Parameter(_fake(param, local[param]))
        params = [param for part in parts for param in part.parameters()]
        for param in params:
            param.grad = torch.zeros_like(param)
        adamw = torch.optim.AdamW(params, foreach=True)
        adamw.step()
        state["adamw"] = weigh(value for one in adamw.state.values() for value in one.values())
        for dtype in ("float32", "bfloat16", "int8"):
            config.optimizer.adam_mini.momentum_dtype = dtype
            total = 0
            for part in parts:
                optimizer = optimizer_of(part, config.optimizer, dims)
                optimizer.init_state()
                total += weigh(value for one in optimizer.state.values() for value in one.values())
            state[f"adam_mini_{dtype}"] = total
        return {"parameters": weigh(params), "state": state}


def _fake(param: Any, local: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import DTensor

    data = torch.empty(local, dtype=param.dtype)
    if not isinstance(param, DTensor):
        return data
    whole = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(data, param.device_mesh, param.placements, run_check=False, **whole)


def check(words: list[str], ngpu: int, rank: int, plan: Run) -> int:
    """The plan of one rank against what is made there; its bytes of parameters."""
    optimizers, _ = optimizers_of(plan)
    made = in_isolated_process(really_made, words, ngpu, rank)
    held = plan.stage_of(rank).memory_of(rank, optimizers)
    assert held.parameters.bytes == made["parameters"], rank
    assert {key: one.bytes for key, one in held.state.items()} == made["state"], rank
    return held.parameters.bytes


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "ngpu"), [("FSDP2", 1024), ("HSDP", 512), ("FSDP2 x TP", 64), ("PP", 8)])
def test_first_and_last_rank(mesh: str, ngpu: int) -> None:
    words = arguments(mesh, short=True)
    plan = in_isolated_process(_read_run, words, ngpu, False)
    for rank in (0, ngpu - 1):
        check(words, ngpu, rank, plan)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("mesh", "ngpu"),
    [
        (mesh, ngpu)
        for mesh in MESHES
        for ngpu in (8, 64, 512, 1024)
        if (mesh, ngpu) != ("FSDP2 x TP", 8)  # eight ranks of tensor parallelism leave none to FSDP2
    ],
)
def test_the_whole_model_at_every_number_of_ranks(mesh: str, ngpu: int) -> None:
    plan = in_isolated_process(_read_run, arguments(mesh), ngpu, False)
    for rank in (0, ngpu // 2, ngpu - 1):
        parameters = check(arguments(mesh), ngpu, rank, plan)
        if mesh == "FSDP2" and (ngpu, rank) in KNOWN:
            assert parameters == KNOWN[ngpu, rank]


@pytest.mark.slow
def test_parameters_counted_by_hand() -> None:
    for ngpu in sorted({ngpu for ngpu, _ in KNOWN}):
        stage = in_isolated_process(_read_run, arguments("FSDP2"), ngpu, False).stages[0]
        found = {(ngpu, rank): stage.memory_of(rank, {}).parameters.bytes for of, rank in KNOWN if of == ngpu}
        assert found == {key: size for key, size in KNOWN.items() if key[0] == ngpu}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_together_hold_the_model(mesh: str) -> None:
    """At 64 ranks: every element as often as the mesh has copies of it."""
    told = facts(in_isolated_process(_read_run, arguments(mesh, short=True), 64, False))
    copies = MESHES[mesh].get("data_parallel_replicate", 1)
    elements = 4 * told["parameters"]
    # Tensor parallelism does not cut norms, which every one of its ranks then has.
    norms = (2 * LAYERS + 1) * 4096 * 4 * (MESHES[mesh].get("tensor_parallel", 1) - 1)
    assert told["all_ranks"]["parameters"] == copies * elements + norms
    assert told["all_ranks"]["gradients"] == told["all_ranks"]["parameters"]
