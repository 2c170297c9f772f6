"""Bare DTensors with hand-made placements over real gloo ranks: oracle, bits, missing gradients, collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.sharding import Shard as Part

SHAPES = {
    "tok_embeddings.weight": (11, 13),
    "layers.0.attention.wq.weight": (35, 13),  # 5 heads of 7
    "layers.0.attention.wk.weight": (21, 13),  # 3 heads of 7
    "layers.0.attention.wv.weight": (21, 13),
    "layers.0.attention.wo.weight": (13, 35),
    "layers.0.attention.wq.bias": (35,),
    "layers.0.attention_norm.weight": (13,),
    "layers.0.moe.experts.w1": (4, 9, 13),
    "layers.0.mixed.weight": (13, 17),  # stored [in, out]
    "scale": (),
}
FSDP = {"*": [Shard(0)]}
HSDP = {"*": [Replicate(), Shard(0)]}


def fsdp_tp(tp: int) -> dict[str, list[Placement]]:
    """torchtitan's placements of FSDP2 x TP."""
    return {
        "*": [_StridedShard(0, split_factor=tp), Shard(0)],
        "layers.0.attention.wo.weight": [Shard(0), Shard(1)],
        "layers.0.attention_norm.weight": [Shard(0), Replicate()],
    }


MESHES: dict[str, tuple[tuple[int, ...], dict[str, list[Placement]]]] = {
    "FSDP2 over 1": ((1,), FSDP),
    "FSDP2 over 2": ((2,), FSDP),
    "FSDP2 over 3": ((3,), FSDP),
    "FSDP2 over 4": ((4,), FSDP),
    "FSDP2 over 7": ((7,), FSDP),
    "HSDP 2x2": ((2, 2), HSDP),
    "HSDP 2x3": ((2, 3), HSDP),
    "FSDP2 x TP 2x2": ((2, 2), fsdp_tp(2)),
    "FSDP2 x TP 3x2": ((3, 2), fsdp_tp(2)),
    "FSDP2 x TP 2x3": ((2, 3), fsdp_tp(3)),
    "FSDP2 x TP 4x2": ((4, 2), fsdp_tp(2)),
    "rows, then rows": ((2, 3), {"*": [Shard(0), Shard(0)]}),
    "columns over 3": ((3,), {"*": [Shard(1)]}),
    "columns, rows, rows": ((2, 2, 2), {"*": [Shard(1), _StridedShard(0, split_factor=2), Shard(0)]}),
    "rows, copies, columns": ((2, 2, 2), {"*": [Shard(0), Replicate(), Shard(1)]}),
}


STEPS = 6


def place(full: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """This rank's shard of a full tensor, cut by indices rather than by torch, whose uneven strided shards differ."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    box = Part.of(full.shape, placements, mesh.shape, coordinate).box()
    data = full[tuple(slice(*interval) for interval in box)].clone()
    return DTensor.from_local(data, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


class Case:
    """The tensors of SHAPES on a mesh, an AdamMini over them, and gradients that every rank knows in full."""

    def __init__(self, name: str, dtype: torch.dtype, layers: int = 1, **options: Any) -> None:
        shape, placements = MESHES[name]
        self.mesh = init_device_mesh("cpu", shape)
        self.dtype = dtype
        self.shapes = {
            key.replace("layers.0", f"layers.{layer}"): value
            for layer in range(layers)
            for key, value in SHAPES.items()
        }
        self.generator = torch.Generator().manual_seed(0)
        self.full = {key: self.random(value) for key, value in self.shapes.items()}
        self.placements = {}
        for key, value in self.shapes.items():
            wanted = placements.get(key.replace(key[:9], "layers.0.", 1), placements["*"])
            self.placements[key] = [one if getattr(one, "dim", -1) < len(value) else Replicate() for one in wanted]
        self.params = {
            key: torch.nn.Parameter(place(value.to(dtype), self.mesh, self.placements[key]))
            for key, value in self.full.items()
        }
        roles = {"scale": "bias", "mixed.weight": "neuron.T"}
        self.partition = Partition.transformer(n_heads=5, n_kv_heads=3, roles=roles)
        names = list(self.params)
        groups = [
            {"params": [(key, self.params[key]) for key in names[:3]], "weight_decay": 0.1},
            {"params": [(key, self.params[key]) for key in names[3:]], "weight_decay": 0.0},
        ]
        self.decay = {key: 0.1 if number < 3 else 0.0 for number, key in enumerate(names)}
        self.optimizer = AdamMini(groups, lr=1e-2, partition=self.partition, **options)

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, number: int, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """One step with new gradients, clipped to norm 1, at a learning rate of its own."""
        grads = {key: self.random(value) * (number + 1) for key, value in self.shapes.items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        grads = {key: grad / norm.clamp_min(1) for key, grad in grads.items()}
        for key, param in self.params.items():
            param.grad = None if key in without else place(grads[key].to(self.dtype), self.mesh, self.placements[key])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(number)
        self.optimizer.step()
        return grads

    @staticmethod
    def lr(number: int) -> float:
        return 1e-2 * (1 - number / 40)

    def own(self, key: str, full: Tensor) -> Tensor:
        return place(full, self.mesh, self.placements[key]).to_local()


def against_oracle(rank: int, world: int, name: str, foreach: bool | None) -> float:
    case = Case(name, torch.float64, foreach=foreach)
    layouts = {key: blocks.layout for key, blocks in case.partition.assign(case.shapes).items()}
    oracle = Oracle(case.full, layouts)
    for number in range(STEPS):
        grads = case.step(number)
        oracle.step(grads, lr=case.lr(number), betas=(0.9, 0.999), eps=1e-8, weight_decay=case.decay)
    worst = 0.0
    for key, param in case.params.items():
        mine = param.to_local().detach()
        worst = max(worst, error(mine, case.own(key, oracle.params[key])))
        grid = case.optimizer.state[param]["exp_avg_sq"]
        assert tuple(grid.shape) == layouts[key].grid_shape
    return worst


SLOW = {
    *("FSDP2 over 1", "FSDP2 over 2", "FSDP2 over 3", "FSDP2 over 4", "HSDP 2x2", "FSDP2 x TP 2x2", "FSDP2 x TP 2x3"),
    *("FSDP2 x TP 4x2", "columns over 3"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MESHES])
def test_equals_the_oracle_on_every_mesh(name: str) -> None:
    """Some steps, changing gradients, moving learning rate, two decays, clipping: within 1e-12 in float64."""
    size = torch.Size(MESHES[name][0]).numel()
    errors = run(against_oracle, size, name, None)
    print(f"{name}: largest relative error {max(errors):.1e}")
    assert max(errors) < 1e-12


def bits(
    rank: int, world: int, name: str, dtype: torch.dtype, foreach: bool | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters and second moments in full after some steps, put together from the shards."""
    case = Case(name, dtype, foreach=foreach)
    for number in range(STEPS):
        case.step(number)
    return {
        key: (param.full_tensor().detach(), case.optimizer.state[param]["exp_avg_sq"].full_tensor())
        for key, param in case.params.items()
        if key != "layers.0.mixed.weight"  # its blocks are cut across rows: equal to rounding only
    }


@pytest.mark.parametrize(
    ("dtype", "foreach", "names"),
    [
        (torch.float32, None, ["FSDP2 over 7", "HSDP 2x3"]),
        pytest.param(torch.bfloat16, True, ["FSDP2 over 2", "FSDP2 over 4", "HSDP 2x3"], marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, None, ["FSDP2 over 3", "HSDP 2x2"], marks=pytest.mark.slow),
    ],
)
def test_fsdp_and_hsdp_of_any_size_give_the_bits_of_one_device(
    dtype: torch.dtype, foreach: bool | None, names: list[str]
) -> None:
    want = run(bits, 1, "FSDP2 over 1", dtype, foreach)[0]
    for name in names:
        for got in run(bits, torch.Size(MESHES[name][0]).numel(), name, dtype, foreach):
            for key, (param, grid) in want.items():
                assert torch.equal(got[key][0], param), (name, key)
                assert torch.equal(got[key][1], grid), (name, key)


def test_the_reference_and_the_vectorized_engine_give_the_same_bits() -> None:
    want = run(bits, 1, "FSDP2 over 1", torch.float32, True)[0]
    got = run(bits, 3, "FSDP2 over 3", torch.float32, False)[2]
    assert all(torch.equal(got[key][0], want[key][0]) and torch.equal(got[key][1], want[key][1]) for key in want)


class Collectives(TorchDispatchMode):
    """Records (op, ranks of the group, elements) of every c10d operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = tuple(dist.get_process_group_ranks(group))
            self.calls.append((func._opname, ranks, sum(tensor.numel() for tensor in args[0])))
        return func(*args, **(kwargs or {}))


def collectives(rank: int, world: int, name: str, layers: int) -> list[list[Any]]:
    """What c10d was asked for while planning and in the first step, and in the second step."""
    case = Case(name, torch.float32, layers)
    seen = []
    for number in range(2):
        with Collectives() as counter:
            case.step(number)
        seen.append(counter.calls)
    return seen


@pytest.mark.parametrize(
    ("name", "groups"),
    [("FSDP2 over 2", [(0, 1)]), ("HSDP 2x2", [(0, 1)]), ("FSDP2 x TP 2x2", [(0, 2), (0, 1)]), ("FSDP2 over 1", [])],
)
def test_one_collective_per_group_and_step(name: str, groups: list[tuple[int, ...]]) -> None:
    """However many parameters and param groups; at the start one more per group of the mesh, to check the plan."""
    size = torch.Size(MESHES[name][0]).numel()
    for layers in (1, 5):
        first, second = run(collectives, size, name, layers)[0]
        assert [(op, ranks) for op, ranks, _ in second] == [("allreduce_", ranks) for ranks in groups]
        axes = sum(one > 1 for one in MESHES[name][0])
        # Replicated tensors ask once more, which gradients are Partial; here `scale` is one on every axis.
        assert len(first) == len(second) + 2 * axes
        assert sum(numel == 2 for _, _, numel in first) >= axes


def missing(rank: int, world: int, name: str, ranks: tuple[int, ...], keys: tuple[str, ...]) -> Any:
    """Two whole steps and one in which `ranks` have no gradient of `keys`; state and parameters around it."""
    case = Case(name, torch.float64)
    case.step(0)
    before = {key: param.to_local().detach().clone() for key, param in case.params.items()}
    case.step(1, without=keys if rank in ranks else ())
    after = {key: param.to_local().detach().clone() for key, param in case.params.items()}
    case.step(2)
    state = {key: case.optimizer.state[param] for key, param in case.params.items()}
    moved = {key: not torch.equal(before[key], after[key]) for key in before if before[key].numel()}
    return moved, {
        k: (float(s["step"]), s["exp_avg_sq"].to_local(), s["exp_avg_sq"].placements) for k, s in state.items()
    }


@pytest.mark.parametrize("name", ["FSDP2 over 3", "FSDP2 x TP 2x2"])
@pytest.mark.parametrize("ranks", [(1,), (0, 1, 2, 3)])
def test_a_missing_gradient_hangs_nobody_and_replicas_stay_equal(name: str, ranks: tuple[int, ...]) -> None:
    """On one rank: all move on in step and v, and it alone keeps its parameters. On all: nothing moves."""
    size = torch.Size(MESHES[name][0]).numel()
    for keys in (("layers.0.attention.wq.weight", "layers.0.attention_norm.weight"), tuple(SHAPES)):
        answers = run(missing, size, name, ranks, keys, timeout=60)
        everywhere = set(ranks) >= set(range(size))
        for rank, (moved, state) in enumerate(answers):
            for key in keys:
                if key in moved and key != "scale":
                    assert moved[key] != (rank in ranks), (rank, key)
                if key == "scale":  # replicated on every axis: nobody else is asked
                    continue
                assert state[key][0] == answers[0][1][key][0] == (2 if everywhere else 3), (rank, key)
                peer = rank % MESHES[name][0][-1] if len(MESHES[name][0]) > 1 else 0
                if isinstance(state[key][2][0], Replicate):  # what FSDP's ranks hold in common
                    assert torch.equal(state[key][1], answers[peer][1][key][1]), (rank, key)


def partial_gradients(rank: int, world: int, absent: tuple[int, ...], op: str) -> tuple[Tensor, float, int]:
    """A replicated norm whose gradient is Partial over TP, as TP without FSDP gives it."""
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(5, dtype=torch.float64), mesh, [Replicate()]))
    optimizer = AdamMini([("norm.weight", param)], lr=0.1)
    for number in range(3):
        share = torch.arange(5, dtype=torch.float64) + rank + number
        gone = rank in absent and number == 1
        param.grad = None if gone else DTensor.from_local(share, mesh, [Partial(op)], run_check=False)
        optimizer.step()
    state = optimizer.state[param]
    return param.to_local().detach(), float(state["exp_avg_sq"].to_local()), int(state["step"])


@pytest.mark.parametrize("absent", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_partial_gradients_are_completed_before_they_are_squared(absent: tuple[int, ...], op: str) -> None:
    answers = run(partial_gradients, 3, absent, op, timeout=60)
    whole = Partition.transformer().assign({"norm.weight": (5,)})["norm.weight"].layout
    oracle = Oracle({"norm.weight": torch.ones(5)}, {"norm.weight": whole})
    for number in range(3):
        ranks = [rank for rank in range(3) if number != 1 or rank not in absent]
        shares = [torch.arange(5, dtype=torch.float64) + rank + number for rank in ranks]
        total = sum(shares, torch.zeros(5, dtype=torch.float64)) / (3 if op == "avg" else 1)
        grads = {"norm.weight": total if ranks else None}
        oracle.step(grads, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay={"norm.weight": 0.01})
    for param, second, steps in answers:
        assert torch.equal(param, answers[0][0]) and second == answers[0][1]
        assert error(param, oracle.params["norm.weight"]) < 1e-12
        assert steps == oracle.steps["norm.weight"]


def other_heads(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(place(torch.zeros(12, 4), mesh, [Shard(0)]))
    optimizer = AdamMini([("attention.wq.weight", param)], n_heads=3 if rank else 4)
    try:
        optimizer.init_state()
    except ValueError as error:
        return str(error)
    return "no error"


def test_plans_that_differ_between_ranks_raise_on_all_of_them() -> None:
    for text in run(other_heads, 3, timeout=30):
        assert "plans differ between ranks (0, 1, 2)" in text


def odd_gradient(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(place(torch.zeros(12, 4), mesh, [Shard(0)]))
    param.grad = DTensor.from_local(torch.zeros(12, 4), mesh, [Partial()], run_check=False)
    optimizer = AdamMini([("attention.wo.weight", param)])
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_gradient_placed_otherwise_is_refused_by_name() -> None:
    for text in run(odd_gradient, 2, timeout=30):
        assert "attention.wo.weight" in text and "redistribute" in text
