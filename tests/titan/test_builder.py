"""From the [optimizer] section to AdamMini: what the settings mean, and what is refused at build."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import LRScheduler
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.titan import build_optimizers
from titan_adam_mini.titan.builder import optimizer_of


@pytest.fixture
def model() -> Transformer:
    """Heads of 8 rows: 4 of queries, 2 of keys."""
    torch.manual_seed(0)
    args = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8)
    return Transformer(args)


def settings(**more: Any) -> Any:
    knobs = more.pop("adam_mini", None)
    config = OptimizerConfig(**{"name": "AdamMini", "implementation": "foreach", **more})
    if knobs is not None:
        config.adam_mini = knobs
    return config


def test_settings_mean_what_they_mean_for_adamw(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    config = settings(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    (optimizer,) = build_optimizers([model], config, parallel_dims)
    assert isinstance(optimizer, AdamMini)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.8, 0.9), 1e-6, 0.2)
    assert len(group["params"]) == len(list(model.parameters()))
    assert all(blocks.decay for blocks in optimizer._blocks.values())


def test_heads_come_from_the_model(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    (optimizer,) = build_optimizers([model], settings(), parallel_dims)
    grids = {name: tuple(optimizer.state[param]["exp_avg_sq"].shape) for name, param in model.named_parameters()}
    assert grids["layers.1.attention.wq.weight"] == (4, 1)
    assert grids["layers.1.attention.wk.weight"] == (2, 1)
    assert grids["layers.1.attention.wv.weight"] == (16, 1)
    assert grids["norm.weight"] == (1,)


def test_knobs_reach_the_optimizer(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    knobs = SimpleNamespace(
        roles={"*.w2.weight": "tensor"}, undecayed=["norm"], value_blocks="tensor", momentum_dtype="bfloat16"
    )
    (optimizer,) = build_optimizers([model], settings(adam_mini=knobs), parallel_dims)
    blocks = optimizer._blocks
    assert blocks["layers.0.feed_forward.w2.weight"].layout.num_blocks == 1
    assert blocks["layers.0.attention.wv.weight"].layout.num_blocks == 1
    assert [name for name in blocks if not blocks[name].decay] == [name for name in blocks if "norm" in name]
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("rounding", [True, False])
def test_int8_and_rounding_reach_it_too(parallel_dims: SimpleNamespace, rounding: bool) -> None:
    args = TransformerModelArgs(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8)
    knobs = SimpleNamespace(momentum_dtype="int8", stochastic_rounding=rounding)
    (optimizer,) = build_optimizers([Transformer(args)], settings(adam_mini=knobs), parallel_dims)
    assert optimizer.stochastic_rounding is rounding
    kept = {tuple(param.shape): state["exp_avg"].dtype for param, state in optimizer.state.items()}
    assert kept[16, 128] == torch.int8 and kept[(128,)] == torch.float32


def test_frozen_parameters_are_left_out(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    model.tok_embeddings.weight.requires_grad_(False)
    (optimizer,) = build_optimizers([model], settings(), parallel_dims)
    assert model.tok_embeddings.weight not in optimizer.state
    assert len(optimizer.state) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"early_step_in_backward": True}, ["early_step_in_backward = true", "early_step_in_backward = false"]),
        ({"implementation": "cuda"}, ["implementation = 'cuda'", "'fused', 'foreach', 'for-loop'"]),
        ({"adam_mini": {"value_blocks": "head"}}, ["value_blocks = 'head'"]),
        ({"adam_mini": {"undecayed": ["*.bias"]}}, ["'*.bias'", "matches no parameter"]),
        ({"adam_mini": {"roles": {"norm.weight": "head"}}}, ["unknown role 'head'"]),
        ({"eps": 0.0}, ["Invalid eps"]),
    ],
)
def test_refusals(model: Transformer, parallel_dims: SimpleNamespace, more: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build_optimizers([model], settings(**more), parallel_dims)
    for words in said:
        assert words in str(error.value)


def test_torchft_is_refused(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"fault_tolerance\.enable"):
        build_optimizers([model], settings(), parallel_dims, SimpleNamespace(enabled=True))
    build_optimizers([model], settings(), parallel_dims, SimpleNamespace(enabled=False))


def test_an_unknown_parameter_is_refused_with_both_lines(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    model.adapter = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError) as error:
        build_optimizers([model], settings(), parallel_dims)
    for words in ("adapter.weight", "[optimizer.adam_mini]", "roles = {", "Partition.transformer("):
        assert words in str(error.value)
    build_optimizers([model], settings(adam_mini={"roles": {"adapter.weight": "experts"}}), parallel_dims)


def test_a_model_without_model_args_needs_a_partition(parallel_dims: SimpleNamespace) -> None:
    part = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="model_args"):
        build_optimizers([part], settings(), parallel_dims)
    with_own = partial(build_optimizers, partition=Partition.per_tensor())
    (optimizer,) = with_own([part], settings(), parallel_dims)
    assert optimizer.state[part.weight]["exp_avg_sq"].numel() == 1


def test_a_pipeline_stage_may_lack_what_a_pattern_names(model: Transformer, parallel_dims: SimpleNamespace) -> None:
    model.tok_embeddings = None  # as torchtitan cuts a later stage
    config = settings(adam_mini={"undecayed": ["tok_embeddings.weight", "norm.weight"]})
    with pytest.raises(ValueError, match="tok_embeddings"):
        build_optimizers([model], config, parallel_dims)
    parallel_dims.pp_enabled = True
    (optimizer,) = build_optimizers([model], config, parallel_dims)
    assert [name for name, blocks in optimizer._blocks.items() if not blocks.decay] == ["norm.weight"]


def test_on_the_meta_device_there_is_a_table_and_no_state(parallel_dims: SimpleNamespace) -> None:
    with torch.device("meta"):
        model = Transformer(TransformerModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=16, multiple_of=8))
    optimizer = optimizer_of(model, settings(), parallel_dims)
    assert "layers.*.attention.wq.weight" in optimizer.table()
    with pytest.raises(ValueError, match="meta"):
        build_optimizers([model], settings(), parallel_dims)


def test_parts_step_save_and_load_as_one(parallel_dims: SimpleNamespace) -> None:
    """Two model parts, a learning rate that moves, and torchtitan's own flattened state dict."""

    def parts() -> list[Transformer]:
        torch.manual_seed(1)
        args = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=8)
        first, second = Transformer(args), Transformer(args)
        del first.layers["1"], second.layers["0"]
        second.tok_embeddings = None
        first.norm = first.output = None
        return [first, second]

    def build(model_parts: list[Transformer]) -> tuple[Any, Any]:
        container = build_optimizers(model_parts, settings(lr=0.01), parallel_dims)
        return container, build_lr_schedulers(container, LRScheduler(warmup_steps=3), 10)

    def run(model_parts: list[Transformer], container: Any, schedule: Any, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for part in model_parts:
                for param in part.parameters():
                    param.grad = torch.randn(param.shape, generator=generator)
            container.step()
            schedule.step()
            container.zero_grad()

    straight, halted, resumed = parts(), parts(), parts()
    run(straight, *build(straight), range(6))

    container, schedule = build(halted)
    run(halted, container, schedule, range(3))
    saved, saved_schedule = container.state_dict(), schedule.state_dict()
    assert not any(key.endswith("param_names") for key in saved)
    flattened = StateDictOptions(flatten_optimizer_state_dict=True)
    own = [get_optimizer_state_dict(part, one, options=flattened) for part, one in zip(halted, container, strict=True)]
    assert set(saved) == {key for keys in own for key in keys if not key.endswith("param_names")}

    for part, other in zip(resumed, halted, strict=True):
        part.load_state_dict(other.state_dict())
    container, schedule = build(resumed)
    container.load_state_dict(saved)
    schedule.load_state_dict(saved_schedule)
    run(resumed, container, schedule, range(3, 6))
    for one, two in zip(straight, resumed, strict=True):
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b), name
