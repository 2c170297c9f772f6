"""What the optimizer refuses on several ranks: in words, on every rank that could wait for another, by a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from titan_adam_mini import AdamMini, Partition

DEADLINE = 60


def parameter(mesh: DeviceMesh, *places: Placement, shape: tuple[int, ...] = (12, 6)) -> torch.nn.Parameter:
    """Made without communication, so that ranks may make different ones."""
    return torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, list(places), src_data_rank=None))


def words_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


# Plans that differ


def differing(rank: int, world: int, what: str) -> str:
    mesh = init_device_mesh("cpu", (world,))
    odd = rank == world - 1
    params = {"layers.0.wq.weight": parameter(mesh, Shard(0)), "layers.0.wo.weight": parameter(mesh, Shard(0))}
    options: dict[str, Any] = {"n_heads": 3}
    if what == "heads":
        options["n_heads"] = 4 if odd else 3
    if what == "order" and odd:
        params = dict(reversed(params.items()))
    if what == "names" and odd:
        params = {name.replace("0", "1"): param for name, param in params.items()}
    if what == "one more" and odd:
        params["norm.weight"] = parameter(mesh, Shard(0), shape=(7,))
    if what == "frozen" and odd:
        params["layers.0.wo.weight"].requires_grad_(False)
    if what == "placement" and odd:
        params["layers.0.wo.weight"] = parameter(mesh, Replicate())
    if what == "value blocks":
        params = {"layers.0.wv.weight": parameter(mesh, Shard(0))}
        options = {"value_blocks": "tensor" if odd else "neuron"}
    if what == "dtype" and odd:
        params = {name: torch.nn.Parameter(param.detach().double()) for name, param in params.items()}
    return words_of(AdamMini(params.items(), **options).init_state)


@pytest.mark.parametrize(
    "what", ["heads", "order", "names", "one more", "frozen", "placement", "value blocks", "dtype"]
)
def test_plans_that_differ_raise_on_every_rank(what: str) -> None:
    for text in run(differing, 3, what, timeout=DEADLINE):
        assert "plans differ between ranks (0, 1, 2)" in text, text


def differing_pairs(rank: int, world: int) -> str:
    """On a 2x2 mesh the ranks of one column disagree: both groups of each of its ranks hear of it, or none."""
    mesh = init_device_mesh("cpu", (2, 2))
    optimizer = AdamMini(
        [("wq.weight", parameter(mesh, Shard(0), Replicate()))], n_heads=4 if mesh.get_coordinate()[1] else 3
    )
    return words_of(optimizer.init_state)


def test_plans_that_differ_across_one_axis_only() -> None:
    texts = run(differing_pairs, 4, timeout=DEADLINE)
    assert "(0, 1)" in texts[0] and "(0, 1)" in texts[1] and "(2, 3)" in texts[2] and "(2, 3)" in texts[3]
    assert not any("(0, 2)" in text or "(1, 3)" in text for text in texts)


# Gradients that do not fit


def misplaced(rank: int, world: int, kind: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    param = parameter(mesh, Shard(0), Replicate())
    data = param.to_local().detach().clone()
    places: dict[str, list[Placement]] = {
        "partial, sharded parameter": [Partial(), Replicate()],
        "maximum": [Shard(0), Partial("max")],
        "other dim": [Shard(1), Replicate()],
        "sharded further": [Shard(0), Shard(1)],
        "other axis": [Replicate(), Shard(0)],
    }
    if kind == "plain":
        gradient: Tensor = torch.ones(12, 6)
    elif kind == "other mesh":
        gradient = distribute_tensor(torch.ones(12, 6), init_device_mesh("cpu", (4,)), [Replicate()])
    else:
        gradient = DTensor.from_local(data, mesh, places[kind], run_check=False, shape=param.shape, stride=(6, 1))
    optimizer = AdamMini([("layers.7.wo.weight", param)])
    try:
        param.grad = gradient
    except RuntimeError:  # torch itself refuses some as a .grad
        return "torch refuses it"
    before = param.to_local().detach().clone()
    text = words_of(optimizer.step)
    assert torch.equal(before, param.to_local())
    return text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("partial, sharded parameter", "on mesh axis 0 the parameter is S(0) but its gradient P(sum)"),
        ("maximum", "on mesh axis 1 the parameter is R but its gradient P(max)"),
        ("other dim", "on mesh axis 0 the parameter is S(0) but its gradient S(1)"),
        ("sharded further", "on mesh axis 1 the parameter is R but its gradient S(1)"),
        ("other axis", "on mesh axis 1 the parameter is R but its gradient S(0)"),
        ("plain", "its gradient a Tensor"),
        ("other mesh", "and its gradient on"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_name(kind: str, words: str) -> None:
    for text in run(misplaced, 4, kind, timeout=DEADLINE):
        if text != "torch refuses it":
            assert "layers.7.wo.weight" in text and words in text, text


def embedding(rank: int, world: int) -> Tensor:
    """As torch's row-wise parallel embedding leaves it: the parameter sharded, its gradient whole on every rank."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    whole, gradient = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    param = torch.nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), Shard(0)]))
    param.grad = DTensor.from_local(gradient, mesh, [Replicate(), Replicate()], run_check=False)
    plain = torch.nn.Parameter(whole.clone())
    plain.grad = gradient
    for one in (param, plain):
        AdamMini([("tok_embeddings.weight", one)], lr=0.1, partition=Partition.per_tensor()).step()
    assert not torch.equal(plain, whole)
    return (param.full_tensor() - plain).abs().max().detach()


def test_a_gradient_that_is_whole_where_its_parameter_is_sharded_is_cut() -> None:
    assert max(run(embedding, 4, timeout=DEADLINE)) < 1e-14


def meta(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    with torch.device("meta"):
        local = torch.empty(6, 6)
    param = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
    return words_of(AdamMini([("norm.weight", param)], partition=Partition.per_tensor()).init_state)


def test_parameters_on_the_meta_device_are_refused_by_name() -> None:
    for text in run(meta, 2, timeout=DEADLINE):
        assert "norm.weight" in text and "meta" in text, text


def grown(rank: int, world: int) -> dict[str, tuple[int, int]]:
    """A group that comes later, then a frozen one: planned anew on all ranks, what was there goes on."""
    mesh = init_device_mesh("cpu", (world,))
    names = ("norm.weight", "layers.0.attention_norm.weight")
    params = {name: parameter(mesh, Shard(0), shape=(7,)) for name in names}

    def steps(optimizer: AdamMini, count: int) -> None:
        for _ in range(count):
            for param in params.values():
                param.grad = torch.ones_like(param)
            optimizer.step()

    optimizer = AdamMini([(names[0], params[names[0]])], lr=0.1)
    steps(optimizer, 2)
    optimizer.add_param_group({"params": [(names[1], params[names[1]])], "lr": 0.2})
    steps(optimizer, 3)
    params[names[0]].requires_grad_(False)
    steps(optimizer, 1)
    counts = [int(optimizer.state[param]["step"]) for param in params.values()]
    assert all(float(optimizer.state[param]["exp_avg_sq"].to_local()) > 0 for param in params.values())
    return dict(zip(names, counts, strict=True))


def test_groups_added_and_parameters_frozen_are_planned_anew() -> None:
    for counts in run(grown, 3, timeout=DEADLINE):
        assert counts == {"norm.weight": 5, "layers.0.attention_norm.weight": 4}
