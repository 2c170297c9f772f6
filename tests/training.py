"""The decoder trained for real under every mesh: forward, backward and clipping by torch, beside the float64 oracle."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from collectives import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.decoder import Decoder, Sizes, loss_of, shard_data, shard_experts, shard_tensors, tokens
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Box, shard_of

BATCH = 2
"""Sequences per data rank and step."""
DECAYS = {"feed_forward": 0.3, "": 0.02}
"""Decay of the two parameter groups: of names that hold the first word, and of the others."""
Call = tuple[str, tuple[int, ...], int]
"""A collective: the operation, the ranks, the number of elements."""


@dataclass(frozen=True)
class Case:
    """A mesh, and how each of its axes ("pp", "rep", "dp", "tp", "ep"; outer first) parallelises the decoder."""

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
    """Mesh axes from keywords, outer first."""
    return tuple(sizes.items())


EVEN = Sizes(vocab=32, dim=12, n_kv_heads=6, head_dim=8, hidden=24)
TP2 = Sizes(n_kv_heads=2)  # tensor parallel ranks need whole heads each for their forward pass
CASES: dict[str, Case] = {
    **{f"FSDP2 {n}": Case(axes(dp=n)) for n in (1, 2, 3, 4, 5, 7)},
    "FSDP2 8, empty shards": Case(axes(dp=8), Sizes(dim=5, hidden=7)),
    "HSDP 2x2": Case(axes(rep=2, dp=2)),
    "HSDP 2x3": Case(axes(rep=2, dp=3)),
    "HSDP 3x2": Case(axes(rep=3, dp=2)),
    "FSDP2 3, CPU offload": Case(axes(dp=3), offload=True),
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
    "MoE, FSDP2 2, experts Shard(1)": Case(axes(dp=2), Sizes(experts=3, hidden=14), expert_dim=1),
    "MoE, EP 2": Case(axes(ep=2), Sizes(experts=5)),
    "MoE, FSDP2 x EP 2x2": Case(axes(dp=2, ep=2), Sizes(experts=5)),
    "PP 2": Case(axes(pp=2)),
    "PP x FSDP2 2x2": Case(axes(pp=2, dp=2)),
}


class Training:
    """One rank's part of a case: the parallelised decoder, its optimizer, and the oracle, fed by an unsharded copy."""

    def __init__(self, case: Case, **options: Any) -> None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self.case = case
        names = tuple(name for name, _ in case.axes)
        self.mesh = init_device_mesh("cpu", tuple(size for _, size in case.axes), mesh_dim_names=names)
        data = [name for name in names if name in ("rep", "dp")]
        self.data_ranks = prod(self.mesh[name].size() for name in data)
        self.data_rank = 0
        for name in data:
            self.data_rank = self.data_rank * self.mesh[name].size() + self.mesh.get_local_rank(name)
        self.first = "pp" not in names or self.mesh.get_local_rank("pp") == 0
        self.last = "pp" not in names or self.mesh.get_local_rank("pp") == 1
        self.whole = Decoder(case.sizes).double()
        self.model = self._parallel(Decoder(case.sizes).double(), data)
        self.params = dict(self.model.named_parameters())
        self.optimizer = AdamMini(groups_of(self.params), lr=1e-2, head_dim=case.sizes.head_dim, **options)
        shapes = {name: param.shape for name, param in self.whole.named_parameters()}
        blocks = Partition.transformer(head_dim=case.sizes.head_dim).assign(shapes)
        self.oracle = Oracle(dict(self.whole.named_parameters()), {name: one.layout for name, one in blocks.items()})

    def _parallel(self, model: Decoder, data: list[str]) -> Decoder:
        """In torchtitan's order: stages, tensors, experts, then data."""
        names = [name for name, _ in self.case.axes]
        if "pp" in names:
            model = model.stage(self.first)
        if "tp" in names:
            shard_tensors(model, self.mesh["tp"], self.case.norms)
        if "ep" in names:
            shard_experts(model, self.mesh["ep"])
        if data:
            offload = CPUOffloadPolicy(pin_memory=False) if self.case.offload else None
            shard_data(model, self.mesh[tuple(data)], offload, self.case.expert_dim)
        return model

    def backward(self, step: int) -> None:
        """Forward and backward: this rank's sequences through its model, all ranks' through the unsharded copy."""
        inputs, labels = tokens(self.case.sizes, BATCH * self.data_ranks, step)
        mine = slice(self.data_rank * BATCH, (self.data_rank + 1) * BATCH)
        weight = 1.0 + step % 3
        self.whole.zero_grad()
        self.model.zero_grad()
        (loss_of(self.whole(inputs), labels) * weight).backward()
        x = inputs[mine]
        if not self.first:
            x = torch.empty(*x.shape, self.case.sizes.dim, dtype=torch.float64)
            dist.recv(x, self._other_stage())
            x.requires_grad_()
        out = self.model(x)
        if self.last:
            (loss_of(out, labels[mine]) * weight).backward()
        else:
            dist.send(out.detach().contiguous(), self._other_stage())
            grad = torch.empty_like(out)
            dist.recv(grad, self._other_stage())
            out.backward(grad)
        if not self.first:
            assert x.grad is not None
            dist.send(x.grad, self._other_stage())

    def _other_stage(self) -> int:
        first, last = dist.get_process_group_ranks(self.mesh.get_group("pp"))
        return last if self.first else first

    def clip(self, limit: float) -> float:
        """Clip both models' gradients by torch's own functions. Returns the relative difference of their norms."""
        want = nn.utils.clip_grad_norm_(self.whole.parameters(), limit)
        by_mesh: dict[Any, list[Tensor]] = {}
        for param in self.params.values():
            assert param.grad is not None
            by_mesh.setdefault(getattr(param, "device_mesh", None), []).append(param.grad)
        square = torch.zeros((), dtype=torch.float64)
        for grads in by_mesh.values():
            norm = nn.utils.get_total_norm(grads)
            square += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        if not (self.first and self.last):
            dist.all_reduce(square, group=self.mesh.get_group("pp"))
        nn.utils.clip_grads_with_norm_(list(self.params.values()), limit, square.sqrt(), foreach=False)
        return error(square.sqrt(), want)

    def step(self, lr: float) -> None:
        """One step of the optimizer and of the oracle, whose parameters the unsharded copy takes over."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        whole = dict(self.whole.named_parameters())
        grads = {name: param.grad for name, param in whole.items()}
        decays = {name: decay_of(name) for name in whole}
        self.oracle.step(grads, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decays)
        with torch.no_grad():
            for name, param in whole.items():
                param.copy_(self.oracle.params[name])

    def errors(self) -> dict[str, float]:
        """Largest relative error of this rank's parts of the parameters, and of their first and second moments."""
        worst = {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
        for name, param in self.params.items():
            plan = BlockPlan.of(self.oracle.layouts[name], shard_of(param))
            state = self.optimizer.state[param]
            assert int(state["step"]) == self.oracle.steps[name]
            grid = tuple(tiles.span(*there) for tiles, there in zip(plan.layout.dims, plan.reach, strict=True))
            for key, got, whole, box in (
                ("param", param, self.oracle.params[name], plan.own[0]),
                ("exp_avg", state["exp_avg"], self.oracle.exp_avg[name], plan.own[0]),
                ("exp_avg_sq", state["exp_avg_sq"], self.oracle.exp_avg_sq[name], grid),
            ):
                # Relative to this rank's part; but all momentum of a few rows may be rounding's, so to all of it.
                scale = (
                    float(whole.abs().max() / cut(whole, box).abs().max()) if key == "exp_avg" and box_size(box) else 1
                )
                worst[key] = max(worst[key], error(local(got), cut(whole, box)) / scale)
        return worst


def train(rank: int, world: int, case: Case, steps: int = 20, **options: Any) -> dict[str, Any]:
    """Train a case beside the oracle: new data, a moving learning rate, two decays, clipping in some of the steps.

    Returns the largest errors of all steps, and the collectives of the first and of later steps.
    """
    training = Training(case, **options)
    worst: dict[str, float] = {}
    calls: list[list[Call]] = []
    for step in range(steps):
        training.backward(step)
        seen = {"norm": training.clip(1.5)}
        with Collectives() if step in (0, 1, steps - 1) else nullcontext() as collectives:
            training.step(lr=1e-2 * (1 + step % 5) / 3)
        if collectives is not None:
            calls.append([(one.op.rstrip("_"), one.ranks, one.numel) for one in collectives.list])
        for key, value in {**seen, **training.errors()}.items():
            worst[key] = max(worst.get(key, 0.0), value)
    assert all(later == calls[-1] for later in calls[1:]), calls
    return {"errors": worst, "first": calls[0], "later": calls[-1]}


def decay_of(name: str) -> float:
    """The decay that `groups_of` gives a parameter."""
    return next(decay for word, decay in DECAYS.items() if word in name)


def groups_of(params: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Parameter groups with the decays of DECAYS; empty ones left out."""
    groups = []
    for decay in DECAYS.values():
        pairs = [(name, param) for name, param in params.items() if decay_of(name) == decay]
        if pairs:
            groups.append({"params": pairs, "weight_decay": decay})
    return groups


def local(tensor: Tensor) -> Tensor:
    """This rank's data."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_size(box: Box) -> int:
    """Number of elements inside a box."""
    return prod(stop - start for start, stop in box)


def cut(tensor: Tensor, box: Box) -> Tensor:
    """The part of a tensor inside a box."""
    return tensor[tuple(slice(*interval) for interval in box)]
