"""Times a step on a GPU for every mix of types: `python benchmarks/step_on_gpu.py`.

The tensors of Llama 3 8B with four layers (1.92 billion parameters), plain tensors with random gradients; AdamW fused
and AdamMini fused, each the median of five times four steps that are queued in a row.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402

from titan_adam_mini import AdamMini  # noqa: E402

DIM, HIDDEN, KEYS, VOCAB, LAYERS = 4096, 14336, 1024, 128256, 4
LAYER = {
    "attention.wq.weight": (DIM, DIM),
    "attention.wk.weight": (KEYS, DIM),
    "attention.wv.weight": (KEYS, DIM),
    "attention.wo.weight": (DIM, DIM),
    "feed_forward.w1.weight": (HIDDEN, DIM),
    "feed_forward.w2.weight": (DIM, HIDDEN),
    "feed_forward.w3.weight": (HIDDEN, DIM),
    "attention_norm.weight": (DIM,),
    "ffn_norm.weight": (DIM,),
}
SHAPES = {
    "tok_embeddings.weight": (VOCAB, DIM),
    **{f"layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in LAYER.items()},
    "norm.weight": (DIM,),
    "output.weight": (VOCAB, DIM),
}
QUEUED, REPEATS = 4, 5


def milliseconds(step: Callable[[], object]) -> float:
    """Median time of a step."""
    for _ in range(QUEUED):
        step()
    times = []
    for _ in range(REPEATS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        for _ in range(QUEUED):
            step()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / QUEUED)
    return sorted(times)[REPEATS // 2]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        params = {
            name: torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02)
            for name, shape in SHAPES.items()
        }
        for param in params.values():
            param.grad = torch.randn_like(param) * 1e-3
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params.values(), fused=True)
        baseline = milliseconds(optimizer.step)
        print(f"parameters {dtype}: AdamW fused {baseline:.3f} ms")
        for momentum in (None, torch.bfloat16, torch.int8):
            del optimizer
            gc.collect()
            optimizer = AdamMini(params.items(), lr=1e-4, n_heads=32, n_kv_heads=8, fused=True, momentum_dtype=momentum)
            took = milliseconds(optimizer.step)
            print(f"  AdamMini, momentum {momentum or dtype}: {took:.3f} ms, ratio {took / baseline:.3f}", flush=True)
        del optimizer, params, param
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
