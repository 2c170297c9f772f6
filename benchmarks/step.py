"""One step of AdamMini against AdamW fused, in pairs: `python benchmarks/step.py [--repeats 21] [--threads 2]
[--second-moment factored]`.

On a GPU the tensors of Llama 3 8B with four layers (1.92 billion parameters), steps queued four in a row; on a CPU a
Llama of 60 million parameters in 75 tensors. Plain tensors, random gradients; medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402

from titan_adam_mini import AdamMini  # noqa: E402
from titan_adam_mini.partition import SECOND_MOMENTS  # noqa: E402

QUEUED = 4


def shapes(dim: int, hidden: int, keys: int, vocab: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    layer = {
        "attention.wq.weight": (dim, dim),
        "attention.wk.weight": (keys, dim),
        "attention.wv.weight": (keys, dim),
        "attention.wo.weight": (dim, dim),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "feed_forward.w3.weight": (hidden, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    return {
        "tok_embeddings.weight": (vocab, dim),
        **{f"layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()},
        "norm.weight": (dim,),
        "output.weight": (vocab, dim),
    }


def milliseconds(step: Callable[[], object], device: str) -> float:
    """One step; on a GPU the mean of some that are queued in a row, as training does."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for _ in range(QUEUED):
        step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / QUEUED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--second-moment", choices=SECOND_MOMENTS, default="blocks")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    sizes = (4096, 14336, 1024, 128256, 4) if device == "cuda" else (512, 1536, 512, 32000, 8)
    heads = {"n_heads": sizes[0] // 128, "n_kv_heads": sizes[2] // 128}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, second moments: {args.second_moment}")
    for dtype in (torch.float32, torch.bfloat16):
        for momentum in (None, torch.bfloat16, torch.int8) if dtype == torch.float32 else (None, torch.int8):
            params = {
                name: torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02)
                for name, shape in shapes(*sizes).items()
            }
            for param in params.values():
                param.grad = torch.randn_like(param) * 1e-3
            adamw = torch.optim.AdamW(params.values(), lr=1e-5, fused=True)
            options = {"momentum_dtype": momentum, "second_moment": args.second_moment, **heads}
            mini = AdamMini(params.items(), lr=1e-5, fused=True, **options)
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(args.repeats + 3):
                pair = [(0, adamw.step), (1, mini.step)]
                for which, step in pair if number % 2 else reversed(pair):
                    took = milliseconds(step, device)
                    if number >= 3:
                        times[which].append(took)
            medians = [statistics.median(one) for one in times]
            ratio = statistics.median(two / one for one, two in zip(*times, strict=True))
            print(
                f"parameters {dtype}, momentum {momentum or dtype}: AdamW fused {medians[0]:.2f} ms, AdamMini fused "
                f"{medians[1]:.2f} ms, ratio of medians {medians[1] / medians[0]:.3f}, of pairs {ratio:.3f}",
                flush=True,
            )
            del params, param, adamw, mini
            gc.collect()


if __name__ == "__main__":
    main()
