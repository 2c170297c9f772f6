"""Where the name "AdamMini" enters torchtitan: known, and every other name as before."""

import dataclasses
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchtitan.components.optimizer as titan_optimizer
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.models import llama3, llama4
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols import train_spec

import titan_adam_mini.titan
from titan_adam_mini import AdamMini
from titan_adam_mini.titan import register
from titan_adam_mini.titan.replaced import original_of


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    """A small Llama 3 on the CPU."""
    args = TransformerModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8)
    return llama3.Transformer(args)


def settings(name: str, **more: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, implementation="foreach", **more)


def test_a_spec_has_our_function() -> None:
    assert train_spec.get_train_spec("llama3").build_optimizers_fn is titan_optimizer.build_optimizers
    assert titan_optimizer.build_optimizers is not original_of(titan_optimizer, "build_optimizers")


@pytest.mark.parametrize(("name", "kind"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)])
def test_other_names_are_as_before(
    name: str, kind: type, dense: torch.nn.Module, parallel_dims: SimpleNamespace
) -> None:
    ours = register.build_optimizers([dense], settings(name, weight_decay=0.3), parallel_dims)
    theirs = original_of(titan_optimizer, "build_optimizers")([dense], settings(name, weight_decay=0.3), parallel_dims)
    assert type(ours) is type(theirs) is titan_optimizer.OptimizersContainer
    (one,), (two,) = ours, theirs
    assert type(one) is type(two) is kind
    for mine, original in zip(one.param_groups, two.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in original.items() if k != "params"}
        assert all(a is b for a, b in zip(mine["params"], original["params"], strict=True))


def test_an_unknown_name_is_torchtitans_to_refuse(dense: torch.nn.Module, parallel_dims: SimpleNamespace) -> None:
    with pytest.raises(NotImplementedError, match="Lion"):
        register.build_optimizers([dense], settings("Lion"), parallel_dims)


def test_adam_mini_is_built(dense: torch.nn.Module, parallel_dims: SimpleNamespace) -> None:
    container = titan_optimizer.build_optimizers([dense], settings("AdamMini"), parallel_dims)
    assert [type(one) for one in container] == [AdamMini]


def test_a_second_import_changes_nothing() -> None:
    before = titan_optimizer.build_optimizers
    importlib.reload(register)
    importlib.reload(titan_adam_mini.titan)
    assert titan_optimizer.build_optimizers is before
    assert llama3.llama3_args["adam_mini_debug"].n_heads == 5


def test_whoever_took_torchtitans_function_before_has_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    torchtitans = original_of(titan_optimizer, "build_optimizers")
    early = dataclasses.replace(llama3.get_train_spec(), build_optimizers_fn=torchtitans)
    own = dataclasses.replace(early, build_optimizers_fn=lambda *_: None)
    monkeypatch.setitem(train_spec._extra_train_specs, "early", early)
    monkeypatch.setitem(train_spec._extra_train_specs, "own", own)
    assert train_spec.get_train_spec("early").build_optimizers_fn is titan_optimizer.build_optimizers
    assert early.build_optimizers_fn is torchtitans, "the user's own object is as it was"
    assert train_spec.get_train_spec("own") is own


def test_the_load_balancing_hook_of_experts_stays(parallel_dims: SimpleNamespace) -> None:
    spec = train_spec.get_train_spec("llama4")
    assert spec.build_optimizers_fn is titan_optimizer.build_optimizers_with_moe_load_balancing
    args = llama4.TransformerModelArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8, every_n_layers_nope=None
    )
    model = llama4.Transformer(args)
    container = spec.build_optimizers_fn([model], settings("AdamMini"), parallel_dims)
    assert [type(one) for one in container] == [AdamMini]
    moe = next(layer.moe for layer in model.layers.values() if layer.moe_enabled)
    moe.tokens_per_expert.copy_(torch.arange(len(moe.tokens_per_expert)))
    moe.expert_bias.zero_()
    container.step()
    assert moe.tokens_per_expert.sum() == 0, "the hook resets the counts"
    assert moe.expert_bias.abs().sum() > 0, "the hook moves the bias"
