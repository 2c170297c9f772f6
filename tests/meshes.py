"""The decoder under every mesh: built, trained beside the oracle, its errors measured and its collectives recorded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from decoder import Decoder, Sizes, loss_of, shard_data, shard_experts, shard_tensors, tokens
from oracle import Oracle, error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Placement
from torch.utils._python_dispatch import TorchDispatchMode

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Shard as Part
from titan_adam_mini.sharding import shard_of

BATCH = 2
"""Sequences per data rank and step."""
DECAYS = {"feed_forward": 0.3, "": 0.02}
"""Decay of the two parameter groups: names that hold the first word, and the others."""


@dataclass(frozen=True)
class Case:
    """A mesh, and the way in which each of its axes ("pp", "rep", "dp", "tp", "ep") parallelises the decoder."""

    axes: tuple[tuple[str, int], ...]
    sizes: Sizes = field(default_factory=Sizes)
    norms: str = "sequence"
    offload: bool = False
    expert_dim: int = 0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.axes)


def axes(**sizes: int) -> tuple[tuple[str, int], ...]:
    """Mesh axes, outer first."""
    return tuple(sizes.items())


EVEN = Sizes(vocab=32, dim=12, n_kv_heads=6, head_dim=8, hidden=24)
TP2 = Sizes(n_kv_heads=2)
CASES: dict[str, Case] = {
    **{f"FSDP2 {n}": Case(axes(dp=n)) for n in (1, 2, 3, 4, 5, 7)},
    "FSDP2 8, dim 5": Case(axes(dp=8), Sizes(dim=5, hidden=7)),
    "HSDP 2x2": Case(axes(rep=2, dp=2)),
    "HSDP 2x3": Case(axes(rep=2, dp=3)),
    "HSDP 3x2": Case(axes(rep=3, dp=2)),
    "CPU offload 3": Case(axes(dp=3), offload=True),
    "TP 2": Case(axes(tp=2), TP2),
    "TP 3": Case(axes(tp=3)),
    "TP 2, even": Case(axes(tp=2), EVEN),
    "TP 2, plain norms": Case(axes(tp=2), TP2, norms="plain"),
    "FSDP2 x TP 2x2, even": Case(axes(dp=2, tp=2), EVEN),
    "FSDP2 x TP 4x2, even": Case(axes(dp=4, tp=2), EVEN),
    "FSDP2 x TP 2x2": Case(axes(dp=2, tp=2), TP2),
    "FSDP2 x TP 3x2": Case(axes(dp=3, tp=2), TP2),
    "FSDP2 x TP 2x3": Case(axes(dp=2, tp=3)),
    "FSDP2 x TP 4x2": Case(axes(dp=4, tp=2), TP2),
    "FSDP2 x TP 2x2, norms on dp": Case(axes(dp=2, tp=2), TP2, norms="plain"),
    "HSDP x TP 2x2x2": Case(axes(rep=2, dp=2, tp=2), TP2),
    "MoE, FSDP2 3": Case(axes(dp=3), Sizes(experts=5)),
    "MoE, FSDP2 2, experts Shard(1)": Case(axes(dp=2), Sizes(experts=3, dim=10, hidden=14), expert_dim=1),
    "MoE, EP 2": Case(axes(ep=2), Sizes(experts=5)),
    "MoE, FSDP2 x EP 2x2": Case(axes(dp=2, ep=2), Sizes(experts=5)),
    "PP 2": Case(axes(pp=2)),
    "PP x FSDP2 2x2": Case(axes(pp=2, dp=2)),
}


class Run:
    """One rank's part of a case: the parallelised decoder, its optimizer, and the oracle fed by an unsharded copy."""

    def __init__(self, case: Case, rank: int, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self.case, self.rank = case, rank
        names = tuple(name for name, _ in case.axes)
        self.mesh = init_device_mesh("cpu", tuple(size for _, size in case.axes), mesh_dim_names=names)
        self.whole = Decoder(case.sizes).to(dtype)
        self.model = self._parallel(Decoder(case.sizes).to(dtype), names)
        layouts = Partition.transformer(head_dim=case.sizes.head_dim).assign(
            {name: param.shape for name, param in self.whole.named_parameters()}
        )
        self.layouts = {name: blocks.layout for name, blocks in layouts.items()}
        self.params = dict(self.model.named_parameters())
        self.optimizer = AdamMini(groups_of(self.params), lr=1e-2, head_dim=case.sizes.head_dim, **options)
        self.oracle = Oracle(dict(self.whole.named_parameters()), self.layouts)

    def _parallel(self, model: Decoder, names: tuple[str, ...]) -> Decoder:
        at = dict(zip(names, self.mesh.get_coordinate() or (), strict=True))
        data = [name for name in names if name in ("rep", "dp")]
        self.data = [self.mesh.get_local_rank(name) for name in data]
        self.data_sizes = [self.mesh[name].size() for name in data]
        self.first_stage = at.get("pp", 0) == 0
        self.last_stage = at.get("pp", 1) == 1
        if "pp" in names:
            model = model.stage(self.first_stage)
        if "tp" in names:
            shard_tensors(model, self.mesh["tp"], self.case.norms)
        if "ep" in names:
            shard_experts(model, self.mesh["ep"])
        if data:
            mesh = self.mesh[tuple(data)] if len(data) > 1 else self.mesh[data[0]]
            offload = CPUOffloadPolicy(pin_memory=False) if self.case.offload else None
            shard_data(model, mesh, offload, self.case.expert_dim)
        return model

    def backward(self, step: int) -> None:
        """Forward and backward of one step, on this rank's sequences and, unsharded, on all of them."""
        number = 0
        for coordinate, size in zip(self.data, self.data_sizes, strict=True):
            number = number * size + coordinate
        inputs, labels = tokens(self.case.sizes, BATCH * prod(self.data_sizes), step)
        mine = slice(number * BATCH, (number + 1) * BATCH)
        weight = 1.0 + step % 3
        for model in (self.whole, self.model):
            model.zero_grad()
        (loss_of(self.whole(inputs), labels) * weight).backward()
        x = inputs[mine]
        if not self.first_stage:
            x = torch.empty(*x.shape, self.case.sizes.dim, dtype=self.whole.norm.weight.dtype)
            dist.recv(x, self._peer())
            x.requires_grad_()
        out = self.model(x)
        if self.last_stage:
            (loss_of(out, labels[mine]) * weight).backward()
            if not self.first_stage:
                dist.send(x.grad, self._peer())
        else:
            dist.send(out.detach().contiguous(), self._peer())
            grad = torch.empty_like(out)
            dist.recv(grad, self._peer())
            out.backward(grad)

    def _peer(self) -> int:
        return next(rank for rank in dist.get_process_group_ranks(self.mesh.get_group("pp")) if rank != self.rank)

    def clip(self, limit: float) -> float:
        """Clip both models' gradients with torch's own functions; the relative difference of their norms."""
        want = nn.utils.clip_grad_norm_(self.whole.parameters(), limit)
        meshes: dict[Any, list[Tensor]] = {}
        for param in self.params.values():
            meshes.setdefault(getattr(param, "device_mesh", None), []).append(param)
        squares = []
        for params in meshes.values():
            norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
        square = torch.stack(squares).sum()
        if "pp" in dict(self.case.axes):
            dist.all_reduce(square, group=self.mesh.get_group("pp"))
        got = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.params.values(), limit, got)
        return error(got, want)

    def step(self, lr: float) -> None:
        """One step of the optimizer and of the oracle, whose parameters the unsharded copy takes over."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        whole = dict(self.whole.named_parameters())
        decay = {name: decay_of(name) for name in whole}
        grads = {name: param.grad for name, param in whole.items()}
        self.oracle.step(grads, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        with torch.no_grad():
            for name, param in whole.items():
                param.copy_(self.oracle.params[name])

    def errors(self) -> dict[str, float]:
        """Largest relative error of this rank's parameters, and of their first and second moments."""
        worst = {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
        for name, param in self.params.items():
            plan = BlockPlan.of(self.layouts[name], shard_of(param))
            own = slices(plan.own[0])
            grid = tuple(
                slice(*tiles.span(*there)) for tiles, there in zip(plan.layout.dims, plan.reach, strict=True)
            )
            state = self.optimizer.state[param]
            assert float(state["step"]) == self.oracle.steps[name]
            for key, got, want in (
                ("param", param, self.oracle.params[name][own]),
                ("exp_avg", state["exp_avg"], self.oracle.exp_avg[name][own]),
                ("exp_avg_sq", state["exp_avg_sq"], self.oracle.exp_avg_sq[name][grid]),
            ):
                worst[key] = max(worst[key], error(local(got), want))
        return worst


def train(rank: int, world: int, case: Case, steps: int = 20, **options: Any) -> dict[str, Any]:
    """Train a case beside the oracle. Returns the errors, and the collectives of building, first and later steps."""
    run = Run(case, rank, **options)
    worst: dict[str, float] = {}
    collectives: list[list[Call]] = []
    for step in range(steps):
        run.backward(step)
        worst["norm"] = max(worst.get("norm", 0.0), run.clip(1.5))
        with Collectives() as seen:
            run.step(lr=1e-2 * (1 + step % 5) / 3)
        collectives.append(seen.calls)
        for key, value in run.errors().items():
            worst[key] = max(worst.get(key, 0.0), value)
    assert all(calls == collectives[-1] for calls in collectives[1:]), collectives
    return {"errors": worst, "first": collectives[0], "later": collectives[-1], "axes": case.axes}


def decay_of(name: str) -> float:
    """The decay that `groups_of` gives a parameter."""
    return next(decay for word, decay in DECAYS.items() if word in name)


def groups_of(params: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Two groups with two decays, in the order of DECAYS; one where a model has nothing for the other."""
    groups = []
    for decay in DECAYS.values():
        pairs = [(name, param) for name, param in params.items() if decay_of(name) == decay]
        if pairs:
            groups.append({"params": pairs, "weight_decay": decay})
    return groups


# Bare tensors, without a model


def place(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """`tensor` as a DTensor whose local part is cut out by the core's own reading of the placements."""
    part = Part.of(tensor.shape, placements, mesh.shape, mesh.get_coordinate() or ())
    own = tensor[slices(part.box())].clone()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def slices(box: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(*interval) for interval in box)


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, or the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, param: Tensor) -> Tensor:
    """What a rank that holds `param` would hold of the whole `tensor`."""
    return tensor[slices(shard_of(param).box())]


# Collectives


@dataclass(frozen=True)
class Call:
    """One collective as c10d saw it."""

    op: str
    group: tuple[int, ...]
    numel: int


class Collectives(TorchDispatchMode):
    """Records every collective that reaches c10d's dispatcher, functional or not, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space = func.namespace
        if space == "c10d":
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            numel = sum(tensor.numel() for tensor in tensors)
            self.calls.append(Call(func.__name__.split(".")[0].rstrip("_"), tuple(ranks), numel))
        elif space == "_c10d_functional" and "wait" not in func.__name__:
            self.calls.append(Call(func.__name__.split(".")[0], (), args[0].numel()))
        return func(*args, **(kwargs or {}))


def with_layers(case: Case, layers: int) -> Case:
    """The same case, deeper."""
    return replace(case, sizes=replace(case.sizes, layers=layers))
