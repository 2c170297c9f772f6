"""What people do to an optimizer between steps: freeze, edit groups, replace and move tensors, load half a state."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.state import follow_parameter

SHAPES = {"wq.weight": (8, 6), "w1.weight": (5, 6), "w1.bias": (5,), "norm.weight": (6,)}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def step(optimizer: AdamMini, params: dict[str, nn.Parameter], seed: int = 0) -> None:
    torch.manual_seed(seed)
    for param in params.values():
        grad = torch.randn_like(param)
        param.grad = grad if param.requires_grad else None
    optimizer.step()


def make(params: dict[str, nn.Parameter], **options: Any) -> AdamMini:
    return AdamMini(params.items(), **{"lr": 0.1, "n_heads": 2, **options})


def groups(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, the second with its own rate."""
    pairs = list(params.items())
    return [{"params": pairs[:2]}, {"params": pairs[2:], "lr": 0.5}]


# Names


def reverse_groups(optimizer: AdamMini) -> None:
    optimizer.param_groups.reverse()


def reverse_parameters(optimizer: AdamMini) -> None:
    for group in optimizer.param_groups:
        group["params"].reverse()


def sort_by_size(optimizer: AdamMini) -> None:
    for group in optimizer.param_groups:
        group["params"].sort(key=Tensor.numel)


@pytest.mark.parametrize("edit", [reverse_groups, reverse_parameters, sort_by_size])
def test_names_follow_their_parameters(edit: Callable[[AdamMini], None]) -> None:
    one, two = parameters(), parameters()
    partition = Partition.transformer(n_heads=2, undecayed=["norm", "*.bias"])
    edited, plain = (AdamMini(groups(params), lr=0.1, weight_decay=0.5, partition=partition) for params in (one, two))
    for seed in range(3):
        step(edited, one, seed)
        step(plain, two, seed)
        edit(edited)
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)
    edited.state_dict()
    listed = [
        (name, param)
        for group in edited.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    ]
    assert all(one[name] is param for name, param in listed)


def test_dropped_parameters_take_their_names_and_state_along() -> None:
    params = parameters()
    optimizer = AdamMini(groups(params), n_heads=2)
    step(optimizer, params)
    gone = optimizer.param_groups[0]["params"].pop(0)
    step(optimizer, params)
    assert optimizer.param_groups[0]["param_names"] == ["w1.weight"] and gone not in optimizer.state
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [("wq.weight", params["wq.weight"])]})
    step(optimizer, params)
    assert [group["param_names"] for group in optimizer.param_groups] == [["w1.bias", "norm.weight"], ["wq.weight"]]
    optimizer.param_groups.clear()
    step(optimizer, params)
    assert optimizer.state_dict() == {"state": {}, "param_groups": []}


def test_a_group_that_no_longer_fits_its_names_is_refused() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    flat = nn.Parameter(torch.cat([param.detach().reshape(-1) for param in params.values()]))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"1 parameters and 4 names.*flat partitions"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(param.detach().reshape(-1)) for param in params.values()]
    with pytest.raises(ValueError, match=r"1 dims in the place of 'wq.weight', which had 2"):
        optimizer.step()


def test_a_set_and_options_of_the_whole_optimizer_are_refused_in_a_group() -> None:
    params = parameters()
    with pytest.raises(TypeError, match="need an order"):
        AdamMini([{"params": set(params.values()), "param_names": list(params)}], n_heads=2)
    with pytest.raises(ValueError, match="momentum_dtype applies to the entire optimizer"):
        AdamMini([{"params": params.items(), "momentum_dtype": torch.bfloat16}], n_heads=2)


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "_is_flat_param", "ds_tensor"])
def test_flattened_parameters_are_refused_by_the_name_of_their_framework(mark: str) -> None:
    params = parameters()
    setattr(params["norm.weight"], mark, True)
    framework = "DeepSpeed" if mark == "ds_tensor" else "FSDP1"
    for partition in (None, Partition.per_tensor()):
        with pytest.raises(ValueError, match=rf"'norm\.weight' is .*{framework}"):
            AdamMini(params.items(), partition=partition)


# Freezing


@pytest.mark.parametrize("frozen", list(SHAPES))
def test_freezing_changes_neither_partition_nor_state(frozen: str) -> None:
    params = parameters()
    partition = Partition.transformer(n_heads=2, undecayed=["*.bias"], roles={"w1.weight": "tensor"})
    optimizer = AdamMini(params.items(), partition=partition)
    step(optimizer, params)
    kept = copy.deepcopy(optimizer.state[params[frozen]])
    params[frozen].requires_grad_(False)
    before = params[frozen].detach().clone()
    for seed in range(3):
        step(optimizer, params, seed)
    assert torch.equal(params[frozen], before)
    assert all(torch.equal(optimizer.state[params[frozen]][key], value) for key, value in kept.items())
    params[frozen].requires_grad_(True)
    step(optimizer, params)
    assert float(optimizer.state[params[frozen]]["step"]) == 2


def test_a_pattern_may_match_what_is_frozen_or_comes_later_but_something_it_must() -> None:
    params = parameters()
    params["w1.bias"].requires_grad_(False)
    partition = Partition.transformer(n_heads=2, undecayed=["*.bias", "w2.weight"])
    optimizer = AdamMini(params.items(), partition=partition)
    with pytest.raises(ValueError, match=r"'w2\.weight'"):
        step(optimizer, params)
    late = nn.Parameter(torch.ones(3, 5))
    optimizer.add_param_group({"params": [("w2.weight", late)]})
    step(optimizer, {**params, "w2.weight": late})
    assert params["w1.bias"] not in optimizer.state


def test_what_is_frozen_from_the_start_needs_no_role_until_it_thaws() -> None:
    params = parameters()
    odd = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    optimizer = make({**params, "packed.mystery": odd})
    step(optimizer, params)
    assert len(optimizer.state_dict()["state"]) == 4
    odd.requires_grad_(True)
    with pytest.raises(ValueError, match=r"packed\.mystery"):
        optimizer.step()


def test_planning_happens_once_where_a_parameter_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    params["w1.weight"].requires_grad_(False)
    step(optimizer, params)
    made: list[object] = []
    monkeypatch.setattr(optimizer, "init_state", lambda: made.append(1))
    step(optimizer, params)
    assert not made


# State in and out


def test_an_optimizer_that_has_not_stepped_has_no_state() -> None:
    params = parameters()
    optimizer = make(params)
    saved = optimizer.state_dict()
    assert saved["state"] == {} and saved["param_groups"][0]["param_names"] == list(SHAPES)
    other = make(parameters())
    other.load_state_dict(saved)
    assert not other.state
    step(optimizer, params)
    optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_state_of_frozen_parameters_is_saved_and_loaded() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    params["w1.weight"].requires_grad_(False)
    step(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert len(saved["state"]) == 4
    twin = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    twin["w1.weight"].requires_grad_(False)
    other = make(twin)
    other.load_state_dict(saved)
    assert len(other.state) == 4
    for each in (params, twin):
        each["w1.weight"].requires_grad_(True)
    step(optimizer, params, 2)
    step(other, twin, 2)
    assert all(torch.equal(params[name], twin[name]) for name in SHAPES)


def test_parameters_that_the_state_does_not_have_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    params["w1.weight"].requires_grad_(False)
    optimizer = make(params)
    step(optimizer, params)
    twin = parameters()
    other = make(twin)
    with caplog.at_level(logging.WARNING, "titan_adam_mini"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [record.message for record in caplog.records] == [
        "AdamMini: the loaded state lacks 'w1.weight': their moments start at zero"
    ]
    assert float(other.state[twin["w1.weight"]]["step"]) == 0 and float(other.state[twin["wq.weight"]]["step"]) == 1


def test_a_state_in_another_order_is_put_in_order_by_name() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    backwards = dict(reversed(list(params.items())))
    twin = {name: nn.Parameter(param.detach().clone()) for name, param in backwards.items()}
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == list(backwards)
    for name in SHAPES:
        assert torch.equal(other.state[twin[name]]["exp_avg"], optimizer.state[params[name]]["exp_avg"]), name
    odd = optimizer.state_dict()
    odd["param_groups"][0]["param_names"][1] = "w3.weight"
    with pytest.raises(ValueError, match=r"'w3\.weight' instead of 'w1\.weight'"):
        other.load_state_dict(odd)


def test_a_state_without_names_is_taken_by_place() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    old = copy.deepcopy(optimizer.state_dict())
    del old["param_groups"][0]["param_names"]
    twin = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    other = make(twin)
    other.load_state_dict(old)
    step(optimizer, params, 1)
    step(other, twin, 1)
    assert all(torch.equal(params[name], twin[name]) for name in SHAPES)


def test_a_step_that_is_a_number_counts_on() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    optimizer.state[params["norm.weight"]]["step"] = 5
    step(optimizer, params)
    assert float(optimizer.state[params["norm.weight"]]["step"]) == 6


@pytest.mark.parametrize("foreach", [None, True])
def test_state_of_a_tensor_of_another_shape_is_refused(foreach: bool | None) -> None:
    params = parameters()
    optimizer = make(params, foreach=foreach)
    step(optimizer, params)
    before = params["norm.weight"].detach().clone()
    params["w1.weight"].data = params["w1.weight"].data[:3].clone()
    with pytest.raises(ValueError, match=r"state of 'w1\.weight' has exp_avg of shape \(5, 6\).*\(3, 6\)"):
        step(optimizer, params)
    del optimizer.state[params["w1.weight"]]
    step(optimizer, params)
    assert optimizer.state[params["w1.weight"]]["exp_avg"].shape == (3, 6)
    assert not torch.equal(params["norm.weight"], before)


def test_between_steps_nothing_holds_the_tensors_of_a_step() -> None:
    params = parameters()
    optimizer = make(params)
    step(optimizer, params)
    held = [
        param_step
        for param_step in optimizer._param_steps
        if param_step.param.numel() or param_step.exp_avg.numel() or param_step.grad is not None
    ]
    assert optimizer._param_steps and not held


def test_parameters_that_were_replaced_before_the_first_step_are_let_go() -> None:
    """As accelerate's FSDP2 does it: state_dict(), then sharded tensors in the place of the model's own."""
    params = parameters()
    optimizer = make(params)
    optimizer.load_state_dict(optimizer.state_dict())
    gone = [weakref.ref(param) for param in params.values()]
    sharded = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer.param_groups[0]["params"] = list(sharded.values())
    optimizer.state_dict()
    del params
    gc.collect()
    step(optimizer, sharded)
    gc.collect()
    assert [one() for one in gone] == [None] * 4 and len(optimizer.state) == 4


def test_state_follows_its_parameter_to_another_device() -> None:
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(1)}
    there = torch.empty(3, device="meta")
    follow_parameter("w", state, there, step_on_device=False)
    assert {key: value.device.type for key, value in state.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
    follow_parameter("w", state, there, step_on_device=True)
    assert state["step"].device.type == "meta"


# Nothing is trained


def test_an_optimizer_of_parameters_that_nobody_uses_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = make(params)
    with caplog.at_level(logging.WARNING, "titan_adam_mini"):
        optimizer.step()
        optimizer.step()
    assert len(caplog.records) == 1 and "before fully_shard" in caplog.records[0].message
    caplog.clear()
    used = make(parameters())
    with caplog.at_level(logging.WARNING, "titan_adam_mini"):
        step(used, dict(zip(SHAPES, used.param_groups[0]["params"], strict=True)))
        used.zero_grad()
        used.step()
    assert not caplog.records


def test_a_group_may_be_empty() -> None:
    """As on a pipeline stage that has none of its parameters; schedulers count groups, so it is not left out."""
    params = parameters()
    optimizer = AdamMini([{"params": list(params.items())}, {"params": [], "lr": 0.2}], n_heads=2)
    step(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0]
