"""Llama 3's 291 tensors, scaled down, their gradients, and the optimizers that the stages compare."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..optimizer import AdamMini

HEADS = {"n_heads": 8, "n_kv_heads": 2}
LAYERS = 32


@dataclass(frozen=True)
class Variant:
    """Dtypes of the tensors, and options of AdamMini.

    Attributes:
        name: its name in the table.
        matrix: dtype of the matrices.
        vector: dtype of the norms.
        options: for AdamMini.
    """

    name: str
    matrix: torch.dtype
    vector: torch.dtype
    options: Mapping[str, Any]


FACTORED = {"second_moment": "factored", "momentum_dtype": torch.int8}
VARIANTS = (
    Variant("fp32", torch.float32, torch.float32, {}),
    Variant("bf16 and fp32 norms", torch.bfloat16, torch.float32, {}),
    Variant("bf16, rounded at random", torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True}),
    Variant("fp32, bf16 momentum", torch.float32, torch.float32, {"momentum_dtype": torch.bfloat16}),
    Variant("fp32, int8 momentum", torch.float32, torch.float32, {"momentum_dtype": torch.int8}),
    Variant("fp32, channels", torch.float32, torch.float32, {"second_moment": "channels"}),
    Variant("bf16, factored, int8 momentum", torch.bfloat16, torch.bfloat16, FACTORED),
)


def shapes(dim: int = 512, hidden: int = 1792, vocab: int = 4096) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of 32 layers: 291 tensors, as Llama 3 8B has."""
    key = dim * HEADS["n_kv_heads"] // HEADS["n_heads"]
    layer = {
        "attention.wq.weight": (dim, dim),
        "attention.wk.weight": (key, dim),
        "attention.wv.weight": (key, dim),
        "attention.wo.weight": (dim, dim),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "feed_forward.w3.weight": (hidden, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    return {
        "tok_embeddings.weight": (vocab, dim),
        **{f"layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()},
        "norm.weight": (dim,),
        "output.weight": (vocab, dim),
    }


THREE = ("layers.0.attention_norm.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight")
"""One tensor of each kind: a norm, a matrix of heads, a matrix of rows (of columns, by channels)."""


def parameters(
    device: torch.device, variant: Variant, names: Iterable[str] | None = None, seed: int = 0
) -> dict[str, torch.nn.Parameter]:
    """Parameters with gradients; equal for an equal seed."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes().items():
        if names is not None and name not in names:
            continue
        dtype = variant.vector if len(shape) == 1 else variant.matrix
        param = torch.nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator, device=device) * 0.01).to(dtype)
        found[name] = param
    return found


def adam_mini(params: Mapping[str, Tensor], variant: Variant, lr: float | Tensor = 1e-3, **options: Any) -> AdamMini:
    """AdamMini with its fused engine."""
    given: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, **HEADS, **variant.options, **options}
    return AdamMini(list(params.items()), lr=lr, fused=True, **given)


def state_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that a step changes, by name."""
    found = {}
    for name, param in params.items():
        found[name] = param.detach()
        found |= {f"{name} {key}": value for key, value in optimizer.state[param].items()}
    return found
