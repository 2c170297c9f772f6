"""Stubs of a GPU's operators for simulations: they need the memory of a GPU's kernels and compute nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import FlexAttentionWrapper

from titan_adam_mini.memory.tracker import separate_fake_mode


@contextmanager
def gpu_operators() -> Iterator[None]:
    """A context in which attention and experts use the operators of a GPU.

    Attention saves queries, keys, values, output and a row of sums for the backward pass, whichever kernel computes it;
    on a CPU torch would choose an operator that selective activation checkpointing does not know. Experts are one
    grouped product; which tokens they get, and so the padding between them, is not known here and not needed.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(patch.object(FlexAttentionWrapper, "forward", _flex))
        stack.enter_context(patch("torchtitan.models.moe.utils.generate_permute_indices", _permute_indices))
        stack.enter_context(separate_fake_mode())
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.shape[-1] == value.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    # Flash attention does not take values with smaller heads than keys (MLA).
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _flex(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **_: Any) -> Any:
    output = _attention(q, k, v)
    return (output, output.new_zeros(q.shape[:-1], dtype=torch.float32)) if return_lse else output


class EmptyBlockMask(BlockMask):
    """A block mask without blocks; a real one takes a few kilobytes."""

    def __init__(self) -> None:
        """Without blocks."""


def _permute_indices(
    counts: Tensor, experts: int, ranks: int, length: int, alignment: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, counts and offsets in the shapes of torchtitan's kernel for GPUs."""
    per_expert = counts.new_zeros(experts, dtype=torch.int32)
    return counts.new_zeros(length, dtype=torch.int64), per_expert, per_expert


class NoOpEngine:
    """Replaces the fused engine, whose kernels need real tensors and allocate no memory in a step."""

    name = "no-op"
    version = "no-op"
    step_on_device = False

    def fallback(self, spec: Any) -> None:
        """Accepts every parameter."""

    def check(self, param_steps: Sequence[Any]) -> None:
        """Does nothing."""

    def square_sums(self, param_steps: Sequence[Any]) -> None:
        """Does nothing."""

    def update(self, param_steps: Sequence[Any]) -> None:
        """Does nothing."""
