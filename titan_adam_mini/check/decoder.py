"""A tiny Llama-like decoder with odd sizes, its data, and its parallelisation with torch.

Names and structure are torchtitan's, without the rotary embedding, which has no parameters. Layers are dense or, with
`experts` set, a mixture of experts in which all tokens go through all experts (so that routing, which is not under
test, needs no communication).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


@dataclass(frozen=True)
class Sizes:
    """The decoder's sizes. A head's rows are independent of `dim`; sizes share as few divisors as possible."""

    vocab: int = 29
    dim: int = 10
    layers: int = 2
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 7
    hidden: int = 17
    experts: int = 0
    tokens: int = 6


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Causal attention, several query heads to a key head."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.head_dim = s.head_dim
        self.wq = nn.Linear(s.dim, s.n_heads * s.head_dim, bias=False)
        self.wk = nn.Linear(s.dim, s.n_kv_heads * s.head_dim, bias=False)
        self.wv = nn.Linear(s.dim, s.n_kv_heads * s.head_dim, bias=False)
        self.wo = nn.Linear(s.n_heads * s.head_dim, s.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (w(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, tokens, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(s.dim, s.hidden, bias=False)
        self.w2 = nn.Linear(s.hidden, s.dim, bias=False)
        self.w3 = nn.Linear(s.dim, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """SwiGLU experts, [expert, out, in]; the sum of all experts' outputs, weighted."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(s.experts, s.hidden, s.dim) * 0.3)
        self.w2 = nn.Parameter(torch.randn(s.experts, s.dim, s.hidden) * 0.3)
        self.w3 = nn.Parameter(torch.randn(s.experts, s.hidden, s.dim) * 0.3)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if not isinstance(self.w1, DTensor):
            return self.mix(x, weights, self.w1, self.w2, self.w3)
        # Expert parallelism: every rank has some experts and all tokens, and the outputs are summed.
        mesh = self.w1.device_mesh
        assert isinstance(self.w2, DTensor) and isinstance(self.w3, DTensor)
        x = DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        weights = distribute_from_replicate(weights, mesh)
        out = self.mix(x, weights, self.w1.to_local(), self.w2.to_local(), self.w3.to_local())
        return DTensor.from_local(out, mesh, [Partial()]).full_tensor()

    @staticmethod
    def mix(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        inner = F.silu(torch.einsum("btd,ehd->bteh", x, w1)) * torch.einsum("btd,ehd->bteh", x, w3)
        return torch.einsum("bteh,edh,bte->btd", inner, w2, weights)


def distribute_from_replicate(weights: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's columns of what all ranks of `mesh` have; its gradient is gathered."""
    return DTensor.from_local(weights, mesh, [Replicate()]).redistribute(mesh, [Shard(2)]).to_local()


class MoE(nn.Module):
    """A router and experts."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"gate": nn.Linear(s.dim, s.experts, bias=False)})
        self.experts = Experts(s)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router["gate"](x).softmax(-1))


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and around a residual."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(s.dim), Attention(s)
        self.ffn_norm = Norm(s.dim)
        if s.experts:
            self.moe = MoE(s)
        else:
            self.feed_forward = FeedForward(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        mlp = self.feed_forward if hasattr(self, "feed_forward") else self.moe
        return x + mlp(self.ffn_norm(x))


class Decoder(nn.Module):
    """The full model, or after `stage` a pipeline stage; tokens (or activations) to logits (or activations)."""

    def __init__(self, s: Sizes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes = s
        self.tok_embeddings: nn.Module | None = nn.Embedding(s.vocab, s.dim)
        self.layers = nn.ModuleDict({str(number): Layer(s) for number in range(s.layers)})
        self.norm: nn.Module | None = Norm(s.dim)
        self.output: nn.Module | None = nn.Linear(s.dim, s.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))

    def stage(self, first: bool) -> Decoder:
        """Keep the first or the second half."""
        half = len(self.layers) // 2
        for number in list(self.layers)[half:] if first else list(self.layers)[:half]:
            del self.layers[number]
        if first:
            self.norm = self.output = None
        else:
            self.tok_embeddings = None
        return self


def tokens(sizes: Sizes, batch: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one step, equal on all ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(sizes.vocab, (batch, sizes.tokens + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def shard_data(model: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy | None = None, expert_dim: int = 0) -> None:
    """FSDP2 over a 1-D mesh, HSDP over a 2-D one: every layer, then the root."""
    options = {"mesh": mesh} if offload is None else {"mesh": mesh, "offload_policy": offload}
    for module in model.modules():
        if isinstance(module, Experts) and expert_dim:
            fully_shard(module, shard_placement_fn=lambda param: Shard(expert_dim), **options)
    for module in model.modules():
        if isinstance(module, Layer):
            fully_shard(module, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no pre-multiplied sum, with which FSDP would otherwise apply a divide factor
            module.set_force_sum_reduction_for_comms(True)


def shard_tensors(model: Decoder, mesh: DeviceMesh, norms: str = "sequence") -> None:
    """Tensor parallelism as torchtitan plans it.

    Args:
        model: a full decoder.
        mesh: 1-D.
        norms: "sequence": activations between the projections are sharded along the tokens, so that norms are
            Replicate and get Partial gradients; "plain": norms stay plain tensors and get full activations.
    """
    sequence = norms == "sequence"
    between = Shard(1) if sequence else Replicate()
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    if sequence:
        plan["norm"] = SequenceParallel(use_local_output=False)
    parallelize_module(model, mesh, plan)
    for layer in model.layers.values():
        # Outputs stay DTensors: from local tensors the global size would be inferred wrongly if uneven.
        plan = {
            "attention": PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate()),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=between),
            "feed_forward": PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate()),
            "feed_forward.w1": ColwiseParallel(use_local_output=False),
            "feed_forward.w2": RowwiseParallel(output_layouts=between),
            "feed_forward.w3": ColwiseParallel(use_local_output=False),
        }
        if sequence:
            plan["attention_norm"] = SequenceParallel(use_local_output=False)
            plan["ffn_norm"] = SequenceParallel(use_local_output=False)
        parallelize_module(layer, mesh, plan)


def shard_experts(model: Decoder, mesh: DeviceMesh) -> None:
    """Expert parallelism: every rank of a 1-D mesh takes some experts."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name, param in list(module.named_parameters()):
                module.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])))
