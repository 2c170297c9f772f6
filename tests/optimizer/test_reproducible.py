"""The same bits again: in another run, with another number of threads, with the tensors in another order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_adam_mini import AdamMini

# Large enough for torch to share the work of one operation out among threads, and for the engine to cut it up.
SHAPES = {
    "tok_embeddings.weight": (1001, 301),
    "attention.wq.weight": (1505, 301),
    "attention.wk.weight": (301, 301),
    "norm.weight": (70_001,),
    "attention.wq.bias": (1505,),
}


def trained(names: Iterable[str], **options: Any) -> dict[str, Tensor]:
    """Parameters and second moments after three steps."""
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    pairs = [(name, params[name]) for name in names]
    optimizer = AdamMini(pairs, lr=1e-2, n_heads=5, n_kv_heads=1, **options)
    for _ in range(3):
        for param in params.values():
            param.grad = torch.randn_like(param)
        optimizer.step()
    moments = {f"{name} v": optimizer.state[param]["exp_avg_sq"] for name, param in params.items()}
    return {**{name: param.detach() for name, param in params.items()}, **moments}


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("threads", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_threads_runs_or_order(threads: int, foreach: bool | None) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = trained(SHAPES, foreach=foreach)
        torch.set_num_threads(threads)
        got = trained(reversed(SHAPES), foreach=foreach)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_torch_engines_agree_to_the_bit_and_the_fused_one_to_rounding() -> None:
    """The fused engine adds in an order of its own."""
    slow, vectorized, fused = trained(SHAPES, foreach=False), trained(SHAPES, foreach=True), trained(SHAPES)
    for name, value in slow.items():
        assert torch.equal(vectorized[name], value), name
        torch.testing.assert_close(fused[name], value, rtol=1e-6, atol=1e-7)
