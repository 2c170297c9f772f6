"""Where the name "AdamMini" enters torchtitan: known, and every other name as before."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
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


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    """A small Llama 3 on the CPU."""
    args = TransformerModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8)
    return llama3.Transformer(args)


def settings(name: str, **more: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, implementation="foreach", **more)


def test_every_place_that_holds_the_function_has_ours() -> None:
    assert titan_optimizer.build_optimizers is register.build_optimizers
    assert titan_adam_mini.titan.build_optimizers is register.build_optimizers
    assert train_spec.get_train_spec("llama3").build_optimizers_fn is register.build_optimizers


@pytest.mark.parametrize(("name", "kind"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)])
def test_other_names_are_as_before(
    name: str, kind: type, dense: torch.nn.Module, parallel_dims: SimpleNamespace
) -> None:
    ours = register.build_optimizers([dense], settings(name, weight_decay=0.3), parallel_dims)
    theirs = register._original([dense], settings(name, weight_decay=0.3), parallel_dims)
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


def test_registering_twice_changes_nothing() -> None:
    register.enable()
    register.enable()
    assert titan_optimizer.build_optimizers is register.build_optimizers
    assert not hasattr(register._original, register._MARK)
    assert llama3.llama3_args["adam_mini_debug"].n_heads == 5


def test_a_reload_does_not_wrap_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    original = register._original
    before = register.build_optimizers
    again = importlib.reload(register)
    try:
        again.enable()
        assert again._original is original
        assert titan_optimizer.build_optimizers is again.build_optimizers is not before
        assert train_spec.get_train_spec("llama3").build_optimizers_fn is again.build_optimizers
    finally:
        # Modules imported before the reload, this one among them, go on with what they have.
        register._replace_everywhere({before: again.build_optimizers})


def test_names_copied_by_other_modules_and_specs_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = ModuleType("a_users_module")
    copied.build_optimizers = register._original  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, copied.__name__, copied)
    spec = SimpleNamespace(build_optimizers_fn=register._original)
    monkeypatch.setitem(train_spec._extra_train_specs, "a_users_model", spec)
    register.enable()
    assert copied.build_optimizers is titan_optimizer.build_optimizers  # type: ignore[attr-defined]
    assert spec.build_optimizers_fn is titan_optimizer.build_optimizers


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
