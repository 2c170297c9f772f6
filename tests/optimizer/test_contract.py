"""The public contract on one process: groups, names, refusals, state in and out, pickle and copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from titan_adam_mini import AdamMini, Partition


class Model(nn.Module):
    """A few parameters of different roles."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wq = nn.Linear(6, 12, bias=True, dtype=dtype)
        self.w1 = nn.Linear(6, 5, bias=False, dtype=dtype)
        self.norm = nn.RMSNorm(6, dtype=dtype)


def make(model: nn.Module, **options: Any) -> AdamMini:
    return AdamMini(model.named_parameters(), lr=1e-2, n_heads=3, **options)


def steps(model: nn.Module, optimizer: AdamMini, count: int = 3, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(count):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_parameters_without_names_are_refused_in_words() -> None:
    model = Model()
    for wrong in (model.parameters(), [{"params": list(model.parameters())}], [{"params": model.w1.weight}]):
        with pytest.raises(ValueError, match="named_parameters"):
            AdamMini(wrong, n_heads=3)


def test_names_come_as_pairs_in_groups_or_as_param_names() -> None:
    named = list(Model().named_parameters())
    pairs = AdamMini([{"params": named[:2], "lr": 0.5}, {"params": named[2:]}], n_heads=3)
    names, params = zip(*named, strict=True)
    lists = AdamMini([{"params": list(params), "param_names": list(names)}], n_heads=3)
    assert [group["lr"] for group in pairs.param_groups] == [0.5, 1e-3]
    assert sum(len(group["params"]) for group in lists.param_groups) == 4
    keys = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "maximize"}
    assert set(lists.param_groups[0]) == keys and lists.param_groups[0]["param_names"] == list(names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "Invalid lr: -1"),
        ({"eps": 0.0}, "Invalid eps: 0"),
        ({"betas": (1.0, 0.9)}, r"Invalid betas\[0\]: 1"),
        ({"weight_decay": -0.1}, "Invalid weight_decay: -0.1"),
        ({"amsgrad": True}, "amsgrad"),
        ({"differentiable": True}, "differentiable"),
        ({"dim": 6}, "leave dim out"),
        ({"capturable": True}, "capturable"),
        ({"momentum_dtype": torch.int16}, "momentum_dtype"),
        ({"foreach": True, "fused": True}, "cannot be combined"),
        ({"partition": Partition.per_tensor()}, "pass n_heads, n_kv_heads"),
    ],
)
def test_wrong_settings_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamMini(Model().named_parameters(), **{"n_heads": 3, **options})


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="momentum"):
        AdamMini(Model().named_parameters(), n_heads=3, momentum=0.9)


def test_meta_and_sparse_and_complex_are_refused_by_name() -> None:
    with torch.device("meta"):
        optimizer = make(Model())
    assert "wq.weight" in optimizer.table()  # a plan needs no data
    with pytest.raises(ValueError, match=r"wq\.weight.*meta"):
        optimizer.init_state()
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamMini([("tok_embeddings.weight", embedding.weight)])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight.*sparse"):
        optimizer.step()
    odd = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    optimizer = AdamMini([("w1.weight", odd)])
    odd.grad = torch.zeros_like(odd)
    with pytest.raises(ValueError, match=r"w1\.weight.*complex"):
        optimizer.step()


def test_pickle_and_deepcopy_go_on_as_if_nothing_had_happened() -> None:
    model = Model()
    optimizer = make(model)
    steps(model, optimizer)
    for remake in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin, other = remake((model, optimizer))
        steps(twin, other, seed=5)
        expected, original = copy.deepcopy((model, optimizer))
        steps(expected, original, seed=5)
        assert same(twin, expected)


def test_state_dict_round_trip_keeps_dtypes_and_continues() -> None:
    model = Model(torch.bfloat16)
    optimizer = make(model)
    steps(model, optimizer)
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
    for state in other.state.values():
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    steps(model, optimizer, seed=7)
    steps(twin, other, seed=7)
    assert same(model, twin)


def test_flattened_state_through_torch_continues() -> None:
    model = Model()
    optimizer = make(model)
    steps(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = copy.deepcopy(model)
    other = make(twin)
    other.init_state()
    set_optimizer_state_dict(twin, other, saved, options=options)
    steps(model, optimizer, seed=7)
    steps(twin, other, seed=7)
    assert same(model, twin)


def test_foreign_state_is_refused_and_nothing_changes() -> None:
    model = Model()
    optimizer = make(model)
    steps(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    adamw = torch.optim.AdamW(model.parameters(), lr=9.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    adamw.step()
    with pytest.raises(ValueError, match="AdamW, with one second moment per element"):
        optimizer.load_state_dict(adamw.state_dict())
    missing = copy.deepcopy(before)
    del missing["state"][2]["exp_avg"]
    with pytest.raises(ValueError, match="has no exp_avg"):
        optimizer.load_state_dict(missing)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_a_group_added_later_is_planned_and_a_wrong_one_leaves_no_trace() -> None:
    model = Model()
    optimizer = make(model)
    steps(model, optimizer, 1)
    extra = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"mystery\.weight"):
        optimizer.add_param_group({"params": [("mystery.weight", extra)]})
    with pytest.raises(ValueError, match="two parameters are called"):
        optimizer.add_param_group({"params": [("norm.weight", extra)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("w2.weight", extra)], "lr": 0.5})
    extra.grad = torch.ones_like(extra)
    steps(model, optimizer, 1)
    assert tuple(optimizer.state[extra]["exp_avg_sq"].shape) == (4, 1)
    assert not torch.equal(extra.detach(), torch.ones(4, 3))


def test_replaced_tensors_are_planned_anew_and_old_state_goes() -> None:
    model = Model()
    optimizer = make(model)
    steps(model, optimizer)
    old = optimizer.param_groups[0]["params"][0]
    new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones_like(new)
    optimizer.step()
    assert old not in optimizer.state and float(optimizer.state[new]["step"]) == 1


def test_learning_rate_tensor_maximize_and_closure() -> None:
    one, two = Model(), Model()
    first = AdamMini(one.named_parameters(), torch.tensor(1e-2), n_heads=3, maximize=True, weight_decay=0.0)
    second = AdamMini(two.named_parameters(), 1e-2, n_heads=3, weight_decay=0.0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = -a.grad
    assert first.step(lambda: 3.0) == 3.0
    second.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parameters_have_no_state_until_they_thaw() -> None:
    model = Model()
    model.w1.weight.requires_grad_(False)
    optimizer = make(model)
    steps(model, optimizer, 1)
    assert model.w1.weight not in optimizer.state
    model.w1.weight.requires_grad_(True)
    steps(model, optimizer, 1)
    assert float(optimizer.state[model.w1.weight]["step"]) == 1
    assert float(optimizer.state[model.norm.weight]["step"]) == 2


def test_a_step_with_zero_gradients_and_zero_rate_leaves_parameters() -> None:
    model = Model()
    before = copy.deepcopy(model)
    optimizer = AdamMini(model.named_parameters(), 0.0, n_heads=3)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same(model, before)


def test_momentum_in_bfloat16_and_not_a_number() -> None:
    model = Model()
    optimizer = make(model, momentum_dtype=torch.bfloat16)
    steps(model, optimizer)
    assert optimizer.state[model.wq.weight]["exp_avg"].dtype == torch.bfloat16
    model.wq.weight.grad[0, 0] = float("nan")
    optimizer.step()
    rows = model.wq.weight.isnan().any(1)
    assert rows[:4].all() and not rows[4:].any()  # the first head of four rows, whole, and no other


def test_the_phases_are_named_in_a_profile() -> None:
    model = Model()
    optimizer = make(model)
    with torch.profiler.profile() as profile:
        steps(model, optimizer, 1)
    assert {"AdamMini.exchange", "AdamMini.update"} <= {event.key for event in profile.key_averages()}
