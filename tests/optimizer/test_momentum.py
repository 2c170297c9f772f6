"""Types of momentum on one process: copies, groups, groups added later, and how many bytes the state takes."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from titan_adam_mini import AdamMini
from titan_adam_mini.check.decoder import Decoder, Sizes

LIMITS = {torch.int8: 1.05, torch.bfloat16: 2.05, torch.float32: 4.05}
DEBUG = Sizes(vocab=2048, dim=512, layers=2, n_heads=8, n_kv_heads=2, head_dim=64, hidden=1536)
LLAMA3_8B = Sizes(vocab=128256, dim=4096, layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden=14336)


def model() -> nn.ModuleDict:
    """int8 fits the first, not the others."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"w1": nn.Linear(256, 6, bias=True), "w2": nn.Linear(6, 5, bias=False), "norm": nn.RMSNorm(256)}
    )


def make(module: nn.Module, **options: Any) -> AdamMini:
    return AdamMini(module.named_parameters(), lr=1e-2, **{"momentum_dtype": torch.int8, **options})


def steps(module: nn.Module, optimizer: AdamMini, count: int = 3, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(count):
        for param in module.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_which_parameters_have_which_type(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    optimizer = make(module)
    with caplog.at_level(logging.INFO, "titan_adam_mini"):
        steps(module, optimizer)
    state = optimizer.state[module["w1"].weight]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.int8, (6, 256)),
        "exp_avg_scale": (torch.float32, (6, 2)),
        "exp_avg_sq": (torch.float32, (6, 1)),
    }
    for other in (module["w2"].weight, module["w1"].bias, module["norm"].weight):
        assert optimizer.state[other]["exp_avg"].dtype == torch.float32
        assert "exp_avg_scale" not in optimizer.state[other]
    assert "momentum int8 for 1, float32 for 3;" in caplog.text


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True, "seed": 4}, {"foreach": False}])
def test_copies_go_on_as_if_nothing_had_happened(how: str, options: dict[str, Any]) -> None:
    module = model().to(torch.bfloat16)
    optimizer = make(module, **options)
    steps(module, optimizer)
    if how == "pickle":
        twin, other = pickle.loads(pickle.dumps((module, optimizer)))
    elif how == "deepcopy":
        twin, other = copy.deepcopy((module, optimizer))
    else:
        twin = copy.deepcopy(module)
        other = make(twin, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(module, optimizer, seed=7)
    steps(twin, other, seed=7)
    assert same(module, twin)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_group_added_later_has_int8_too() -> None:
    module = model()
    optimizer = make(module)
    steps(module, optimizer, 1)
    before = optimizer.state[module["w1"].weight]["exp_avg"].clone()
    extra = nn.Parameter(torch.ones(4, 128))
    optimizer.add_param_group({"params": [("w3.weight", extra)], "lr": 0.5})
    extra.grad = torch.ones_like(extra)
    optimizer.init_state()
    assert torch.equal(optimizer.state[module["w1"].weight]["exp_avg"], before), "what was there stays"
    steps(module, optimizer, 1)
    assert optimizer.state[extra]["exp_avg"].unique().tolist() == [127]
    assert optimizer.state[extra]["exp_avg_scale"].shape == (4, 1)


def test_a_gradient_that_is_not_a_number_spoils_its_row() -> None:
    """As with any type: the second moment of the row is not a number either. Other rows go on."""
    module = model()
    optimizer = make(module)
    steps(module, optimizer, 1)
    module["w1"].weight.grad[2, 200] = float("nan")
    optimizer.step()
    assert module["w1"].weight.isnan().all(1).tolist() == [False, False, True, False, False, False]
    scale = optimizer.state[module["w1"].weight]["exp_avg_scale"]
    assert scale.isnan().nonzero().tolist() == [[2, 1]], "and of the momentum, its run"


def test_momentum_of_next_to_nothing_does_not_grow_into_anything() -> None:
    """Gradients stop; momentum decays to nothing, by way of numbers whose scale would overflow."""
    module = model()
    optimizer = make(module, betas=(1e-3, 0.9), weight_decay=0.0)
    steps(module, optimizer, 1)
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    for _ in range(20):
        optimizer.step()
    state = optimizer.state[module["w1"].weight]
    assert not state["exp_avg"].any() and not state["exp_avg_scale"].any()
    assert all(param.isfinite().all() for param in module.parameters())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", [DEBUG, LLAMA3_8B], ids=["debug", "Llama3-8B"])
def test_bytes_of_state_per_parameter(sizes: Sizes, dtype: torch.dtype) -> None:
    """Everything that a checkpoint holds for the optimizer; fake tensors have all but the memory."""
    with FakeTensorMode():
        decoder = Decoder(sizes)
        heads = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
        optimizer = AdamMini(decoder.named_parameters(), momentum_dtype=dtype, **heads)
        optimizer.init_state()
        tensors = [value for state in optimizer.state.values() for value in state.values()]
    count = sum(param.numel() for param in decoder.parameters())
    assert sizes is DEBUG or count == 8_030_261_248
    each = sum(value.numel() * value.element_size() for value in tensors) / count
    print(f"{dtype}: {each:.4f} bytes per parameter")
    assert dtype.itemsize < each <= LIMITS[dtype]
