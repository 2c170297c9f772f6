"""Momentum of one type as another outside torchtitan: converted offline, adopted from state dicts, or told in words."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from meshes import EVEN_RUNS, MESHES, RUNS
from stored_runs import group_of, partition, saved
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from titan_adam_mini import AdamMini
from titan_adam_mini.check.meshes import full_shapes
from titan_adam_mini.check.oracle import error
from titan_adam_mini.checkpoint import check_checkpoint
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.convert.convert import Conversion, convert
from titan_adam_mini.kernels import int8
from titan_adam_mini.momentum import dtype_of

TYPES = [torch.float32, torch.bfloat16, torch.int8]
STATE = "optimizer.state."


def kept(momentum: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a momentum becomes when it is kept in this type."""
    if dtype != torch.int8:
        return {"exp_avg": momentum.to(dtype)}
    values, scale = torch.empty_like(momentum, dtype=torch.int8), torch.empty(int8.scale_shape(momentum.shape))
    int8.quantize(momentum.float(), values, scale)
    return {"exp_avg": values, "exp_avg_scale": scale}


def wide(state: dict[str, Any]) -> Tensor:
    return int8.dequantized(state["exp_avg"], state["exp_avg_scale"]) if "exp_avg_scale" in state else state["exp_avg"]


# titan-adam-mini convert


def entries(path: Path) -> dict[str, Any]:
    stored = Stored(path)
    return {key: stored.value(key) for key in stored.metadata.state_dict_metadata}


def of(entries: dict[str, Any], name: str) -> dict[str, Any]:
    """The state of one parameter."""
    start = f"{STATE}{name}."
    return {key.removeprefix(start): value for key, value in entries.items() if key.startswith(start)}


def converted(source: Path, target: Path, to: str, mesh: str, dtype: torch.dtype | None) -> dict[str, Any]:
    sizes = MESHES[mesh].sizes
    blocks = partition(sizes).assign(full_shapes(sizes))
    group = group_of("AdamW" if to == "adamw" else "AdamMini")
    convert(Conversion(Stored(source), to, blocks, group, None, dtype), target)
    return entries(target)


@pytest.mark.parametrize(
    ("mesh", "params"),
    [
        pytest.param("FSDP2 3, runs", torch.float32, marks=pytest.mark.slow),
        pytest.param("FSDP2 3, runs", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("TP 2, runs", torch.float32, marks=pytest.mark.slow),  # parts along the columns, of one run each
        ("TP 2, cut runs", torch.float32),  # where no AdamMini would keep it so: parts become whole again
    ],
)
def test_adamw_becomes_every_type_and_back(tmp_path: Path, mesh: str, params: torch.dtype) -> None:
    source = saved(tmp_path / "adamw", "AdamW", mesh, params)
    old = entries(source)
    shapes = full_shapes(MESHES[mesh].sizes)
    for dtype in (None, *TYPES):
        new = converted(source, tmp_path / f"{dtype}" / "step-4", "adam_mini", mesh, dtype)
        for name, shape in shapes.items():
            want = kept(of(old, name)["exp_avg"], dtype_of(dtype, params, shape))
            got = of(new, name)
            assert set(got) == {*want, "exp_avg_sq", "step"}
            for key, value in want.items():
                assert got[key].dtype == value.dtype and torch.equal(got[key], value), (dtype, name, key)
        back = converted(tmp_path / f"{dtype}" / "step-4", tmp_path / f"{dtype}, back", "adamw", mesh, None)
        assert set(back) == set(old), "exactly AdamW's own keys"
        for name in shapes:
            got = of(back, name)["exp_avg"]
            assert got.dtype == params and torch.equal(got, wide(of(new, name)).to(params)), (dtype, name)


@pytest.mark.slow
def test_parts_stay_parts_where_runs_allow_it(tmp_path: Path) -> None:
    """So that no rank has to read a whole tensor; a part that is cut inside a run becomes one with the others."""
    for mesh, parts in (("FSDP2 3, runs", 3), ("TP 2, runs", 2), ("TP 2, cut runs", 1)):
        source = saved(tmp_path / mesh, "AdamW", mesh)
        converted(source, tmp_path / mesh / "new", "adam_mini", mesh, torch.int8)
        tensors = Stored(tmp_path / mesh / "new").tensors
        w2 = STATE + "layers.0.feed_forward.w2.weight"
        assert [len(tensors[w2 + key].chunks) for key in (".exp_avg", ".exp_avg_scale")] == [parts, parts]


def test_what_was_converted_goes_on_on_any_mesh(tmp_path: Path) -> None:
    """The scales' parts are where torch looks for them."""
    source = saved(tmp_path / "adamw", "AdamW", "FSDP2 3, even runs")
    new = converted(source, tmp_path / "new", "adam_mini", "FSDP2 3, even runs", torch.int8)
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in full_shapes(EVEN_RUNS).items()}
    optimizer = AdamMini(list(params.items()), partition=partition(EVEN_RUNS), momentum_dtype=torch.int8)
    optimizer.init_state()
    state = {f"{STATE}{name}.{key}": v for name, p in params.items() for key, v in optimizer.state[p].items()}
    check_checkpoint(tmp_path / "new", state)
    dcp.load(state, checkpoint_id=tmp_path / "new", no_dist=True)
    for name, param in params.items():
        assert all(torch.equal(value, new[f"{STATE}{name}.{key}"]) for key, value in optimizer.state[param].items())


# State dicts, without torchtitan


def model() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in full_shapes(RUNS).items()}


def make(params: dict[str, torch.nn.Parameter], dtype: torch.dtype | None) -> AdamMini:
    return AdamMini(list(params.items()), lr=1e-2, partition=partition(RUNS), momentum_dtype=dtype)


def step(params: dict[str, torch.nn.Parameter], optimizer: AdamMini, seed: int) -> None:
    torch.manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()


@pytest.mark.parametrize("here", TYPES)
@pytest.mark.parametrize("there", TYPES)
def test_load_state_dict_converts_and_says_so_once(
    there: torch.dtype, here: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    params, twins = model(), model()
    optimizer, other = make(params, there), make(twins, here)
    step(params, optimizer, 1)
    saved_state = copy.deepcopy(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, "titan_adam_mini"):
        other.load_state_dict(optimizer.state_dict())
    for name, param in params.items():
        old, new = optimizer.state[param], other.state[twins[name]]
        want = kept(wide(old), dtype_of(here, torch.float32, tuple(param.shape)))
        assert set(new) == {*want, "exp_avg_sq", "step"}
        assert all(torch.equal(new[key], value) and new[key].dtype == value.dtype for key, value in want.items()), name
        assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"])
    told = [record.getMessage() for record in caplog.records if "converted" in record.getMessage()]
    assert len(told) == (there != here), told
    if told:
        assert str(there).removeprefix("torch.") in told[0] and str(here).removeprefix("torch.") in told[0]
    for key, state in saved_state["state"].items():
        assert all(torch.equal(optimizer.state_dict()["state"][key][k], value) for k, value in state.items()), (
            "in place"
        )
    step(twins, other, 2)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("there", "here"), [(torch.int8, torch.float32), (torch.float32, torch.int8)])
def test_torchs_own_functions_convert_or_say_why_not(there: torch.dtype, here: torch.dtype, flat: bool) -> None:
    """torch takes from a flat state dict only the keys that the optimizer has: scales are lost on the way."""
    from titan_adam_mini.check.decoder import Decoder

    one, two = Decoder(RUNS), Decoder(RUNS)
    params, twins = dict(one.named_parameters()), dict(two.named_parameters())
    optimizer, other = make(params, there), make(twins, here)
    step(params, optimizer, 1)
    other.init_state()
    before = copy.deepcopy(other.state_dict()["state"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(one, optimizer, options=options)
    if flat and there == torch.int8:
        with pytest.raises(ValueError, match=r"int8 momentum without its scales.*nested"):
            set_optimizer_state_dict(two, other, state, options=options)
        after = other.state_dict()["state"]
        assert all(torch.equal(after[key][k], v) for key, one in before.items() for k, v in one.items())
        return
    set_optimizer_state_dict(two, other, state, options=options)
    for name, param in params.items():
        got, want = wide(other.state[twins[name]]), wide(optimizer.state[param])
        assert torch.equal(got, want) if there == torch.int8 else error(got, want) < 0.5 / 127 + 1e-5


def test_adamws_momentum_alone_is_not_enough() -> None:
    params = model()
    adamw = torch.optim.AdamW(params.values())
    step(params, adamw, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AdamW, with one second moment per element"):
        make(params, torch.int8).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize(("there", "here"), [(torch.int8, torch.float32), (torch.bfloat16, torch.int8)])
def test_check_checkpoint_tells_what_torch_would_cast(there: torch.dtype, here: torch.dtype, tmp_path: Path) -> None:
    """torch's distributed checkpoint reads int8 values into float tensors without a word."""
    states = {}
    for dtype in (there, here, torch.float32, torch.bfloat16):
        params = model()
        optimizer = make(params, dtype)
        optimizer.init_state()
        states[dtype] = {
            f"{STATE}{name}.{key}": v for name, p in params.items() for key, v in optimizer.state[p].items()
        }
    dcp.save(states[there], checkpoint_id=tmp_path, no_dist=True)
    words = [str(dtype).removeprefix("torch.") for dtype in (there, here)]
    with pytest.raises(ValueError, match=rf"\w+ has momentum in {words[0]} there and in {words[1]} here.*load_state_"):
        check_checkpoint(tmp_path, states[here])
    check_checkpoint(tmp_path, states[there])
    if there == torch.bfloat16:
        check_checkpoint(tmp_path, states[torch.float32])  # which torch casts as it should
