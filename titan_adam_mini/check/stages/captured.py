"""A step captured in a CUDA graph, with a learning rate on the GPU that changes between replays, vs. eager steps."""

import traceback
from typing import Any

import torch

from ..stage import Context, Result, engine_of, need_cuda
from ..tensors import THREE, VARIANTS, Variant, adam_mini, parameters, state_of

REPLAYS, WARM_UP = 10, 3


def run(context: Context) -> Result:
    """Passes if all variants are bit-identical to eager steps after every replay."""
    need_cuda(context, "a CUDA graph")
    device = context.of_rank(0)
    torch.cuda.set_device(device)
    numbers: dict[str, Any] = {}
    for variant in VARIANTS:
        try:
            numbers[variant.name] = differing(device, variant)
        except Exception as error:
            traceback.print_exc()
            numbers[variant.name] = f"{type(error).__name__}: {error}"[:200]
    wrong = {name: first for name, first in numbers.items() if first}
    if wrong:
        faults = "; ".join(f"{name}: {first}" for name, first in wrong.items())
        return Result(False, f"captured and eager steps differ, or capturing fails: {faults}", numbers)
    what = f"{REPLAYS} replays with a moving lr, {len(numbers)} variants"
    return Result(True, f"parameters and state bit-equal to eager steps after each of {what}", numbers)


def differing(device: torch.device, variant: Variant) -> str:
    """The first replay and tensors that differ, or ""."""
    names = (*THREE, "tok_embeddings.weight", "layers.7.attention.wk.weight", "norm.weight")
    pairs = []
    for _ in range(2):
        params = parameters(device, variant, names)
        lr = torch.tensor(1e-3, device=device)
        optimizer = adam_mini(params, variant, lr=lr, capturable=True)
        engine_of(optimizer, cuda=True)
        pairs.append((params, lr, optimizer))
    (params, lr, optimizer), (twins, twin_lr, twin) = pairs

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures, and does not run
        optimizer.step()
    for _ in range(WARM_UP):
        twin.step()

    generator = torch.Generator(device).manual_seed(1)
    for replay in range(REPLAYS):
        for rate in (lr, twin_lr):
            rate.fill_(1e-3 / (replay + 1))
        for name, param in params.items():
            fresh = torch.randn(param.shape, generator=generator, device=device) * 0.1 ** (replay % 3)
            for parameter in (param, twins[name]):
                assert parameter.grad is not None
                parameter.grad.copy_(fresh)
        graph.replay()
        twin.step()
        got, want = state_of(optimizer, params), state_of(twin, twins)
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        if wrong:
            return f"replay {replay + 1}: {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"
    if not all(float(value) == WARM_UP + REPLAYS for name, value in got.items() if name.endswith(" step")):
        return "the number of steps is wrong"
    return ""
