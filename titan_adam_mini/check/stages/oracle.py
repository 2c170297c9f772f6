"""AdamMini on DTensors over NCCL compared with the float64 oracle, bit by bit where results must be identical.

Per mesh: ten steps in float32 on a small decoder, with a moving learning rate and gradients that change in
size and are clipped. The largest relative error over parameters and both moments must stay below `TOLERANCE`.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from ..decoder import Sizes
from ..injected import full, gradients, make, oracle, set_lr, values
from ..meshes import DENSE, Mesh, Placed, full_shapes, norms_along_tp
from ..stage import Context, Result, engine_of, on_ranks

STEPS = 10
TOLERANCE = 1e-5
WIDE = Sizes(vocab=131, dim=1160, layers=1, n_heads=6, n_kv_heads=3, head_dim=67, hidden=517)
"""Rows longer than a kernel's block, with a length that is not a power of two."""
LESS_WIDE = replace(WIDE, dim=260, head_dim=17, hidden=101)
"""A smaller one for CPUs, which have no such blocks."""
KEYS = ("params", "exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]


def wide(device: str) -> Sizes:
    """The decoder with long rows."""
    return WIDE if device == "cuda" else LESS_WIDE


def meshes(ranks: int, device: str) -> list[Mesh]:
    """The meshes for this number of ranks."""
    even = Sizes(vocab=8 * ranks, dim=8 * ranks, n_heads=6, n_kv_heads=3, head_dim=2 * ranks, hidden=16 * ranks)
    found = [
        Mesh(f"FSDP2 {ranks}, even", (ranks,), ("dp",), even, device=device),
        Mesh(f"FSDP2 {ranks}, uneven", (ranks,), ("dp",), DENSE, device=device),
        Mesh(f"FSDP2 {ranks}, wide", (ranks,), ("dp",), wide(device), device=device),
    ]
    if ranks >= 4 and ranks % 2 == 0:
        found += [
            Mesh(f"HSDP 2x{ranks // 2}", (2, ranks // 2), ("rep", "dp"), DENSE, device=device),
            Mesh(f"FSDP2 x TP {ranks // 2}x2", (ranks // 2, 2), ("dp", "tp"), DENSE, device=device),
        ]
    return found


def run(context: Context) -> Result:
    """All meshes, on all ranks."""
    ranks = on_ranks(context, on_rank)
    numbers: dict[str, Any] = {"engine": ranks[0]["engine"], "errors": {}, "bits": {}}
    for name in ranks[0]["errors"]:
        numbers["errors"][name] = max(max(result["errors"][name].values()) for result in ranks)
    for name in ranks[0]["bits"]:
        numbers["bits"][name] = sorted({wrong for result in ranks for wrong in result["bits"][name]})
    worst = max(numbers["errors"], key=lambda name: float(numbers["errors"][name]))
    differing = {name: wrong for name, wrong in numbers["bits"].items() if wrong}
    passed = numbers["errors"][worst] < TOLERANCE and not differing
    bits = f"same bits in {len(numbers['bits'])} comparisons" if not differing else f"DIFFERENT BITS: {differing}"
    line = f"largest relative error {numbers['errors'][worst]:.1e} ({worst}) on {len(numbers['errors'])} meshes; {bits}"
    return Result(passed, f"{line}; {numbers['engine']}", numbers)


def on_rank(context: Context, rank: int) -> dict[str, Any]:
    """This rank's errors by mesh, and the names of tensors that are not bit-identical by comparison."""
    answer: dict[str, Any] = {"errors": {}, "bits": {}}
    device = context.of_rank(rank)
    for mesh in meshes(context.ngpu, context.device):
        want = oracle(mesh.sizes, STEPS)
        placed = Placed.decoder(mesh, torch.float32).fill(values(full_shapes(mesh.sizes)))
        optimizer = make("AdamMini", placed.params, mesh.sizes, fused=True)
        answer["engine"] = engine_of(optimizer, context.cuda)
        for step in range(STEPS):
            placed.inject(gradients(full_shapes(mesh.sizes), step), norms_along_tp(mesh))
            set_lr(optimizer, step)
            optimizer.step()
        got = local_results(placed, optimizer)
        answer["errors"][mesh.name] = relative_errors(got, placed, want)
        if "tp" not in mesh.axes:  # blocks of full rows: any number of ranks must be bit-identical to one
            one = on_one_device(mesh.sizes, torch.float32, device)
            for key in KEYS[:2]:
                one[key] = {name: value.flatten()[placed.index[name]] for name, value in one[key].items()}
            answer["bits"][f"{mesh.name} and one device"] = different(one, got)
    for dtype in (torch.float32, torch.bfloat16):
        plain = on_one_device(wide(device.type), dtype, device)
        name = str(dtype).removeprefix("torch.")
        for what, other in (
            ("twice", on_one_device(wide(device.type), dtype, device)),
            ("odd gradient addresses", on_one_device(wide(device.type), dtype, device, odd_grads=True)),
            ("odd parameter addresses", on_one_device(wide(device.type), dtype, device, odd_params=True)),
        ):
            answer["bits"][f"{what} {name}"] = different(plain, other)
        answer["bits"][f"rows in three pieces {name}"] = pieces(dtype, device)
    return answer


def local_results(placed: Placed, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """This rank's parameters and momentum, and full second moments; on the CPU."""
    state = {name: optimizer.state[param] for name, param in placed.params.items()}
    for param_state in state.values():
        assert float(param_state["step"]) == STEPS, param_state["step"]
    return {
        "params": {name: value for name, (_, value) in placed.parts().items()},
        "exp_avg": {
            name: value
            for name, (_, value) in placed.parts(
                {n: param_state["exp_avg"] for n, param_state in state.items()}
            ).items()
        },
        "exp_avg_sq": {name: full(param_state["exp_avg_sq"]).cpu() for name, param_state in state.items()},
    }


def relative_errors(got: dict[str, Tensors], placed: Placed, want: Any) -> dict[str, float]:
    """As `oracle.error`, for this rank's elements: largest difference over the tensor's largest entry."""
    found = {}
    for key in KEYS:
        worst = 0.0
        for name, true in getattr(want, key).items():
            mine = true if key == "exp_avg_sq" else true.flatten()[placed.index[name]]
            if mine.numel():
                off = float((got[key][name].double() - mine).abs().max() / true.abs().max().clamp_min(1e-30))
                worst = max(worst, off if off == off else float("inf"))
        found[key] = worst
    return found


def on_one_device(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, odd_grads: bool = False, odd_params: bool = False
) -> dict[str, Tensors]:
    """The same steps on plain tensors of one device; results on the CPU."""
    shapes = full_shapes(sizes)
    params = {name: torch.nn.Parameter(put(value, dtype, device, odd_params)) for name, value in values(shapes).items()}
    optimizer = make("AdamMini", params, sizes, fused=True)
    for step in range(STEPS):
        for name, grad in gradients(shapes, step).items():
            params[name].grad = put(grad, dtype, device, odd_grads)
        set_lr(optimizer, step)
        optimizer.step()
    state = {name: optimizer.state[param] for name, param in params.items()}
    return {
        "params": {name: param.detach().cpu() for name, param in params.items()},
        **{key: {name: param_state[key].cpu() for name, param_state in state.items()} for key in KEYS[1:]},
    }


def put(value: torch.Tensor, dtype: torch.dtype, device: torch.device, odd: bool) -> torch.Tensor:
    """The value on the device; `odd`: one element after the start of an allocation, unaligned for wide loads."""
    if not odd:
        return value.to(device, dtype)
    buffer = torch.empty(value.numel() + 1, dtype=dtype, device=device)
    return buffer[1:].view(value.shape).copy_(value)


def different(one: dict[str, Tensors], other: dict[str, Tensors]) -> list[str]:
    """The tensors whose bits differ."""
    return [f"{key} {name}" for key in KEYS for name in one[key] if not torch.equal(one[key][name], other[key][name])]


def pieces(dtype: torch.dtype, device: torch.device) -> list[str]:
    """A matrix of row blocks, in one and in three independent pieces of rows, must be bit-identical."""
    sizes = wide(device.type)
    name, shape = "layers.0.feed_forward.w1.weight", (sizes.hidden, sizes.dim)
    start = values({name: shape})[name]
    results = []
    for cuts in ((0, sizes.hidden), (0, 1, sizes.hidden // 2, sizes.hidden)):
        params = [torch.nn.Parameter(start[low:high].to(device, dtype)) for low, high in pairwise(cuts)]
        optimizers = [make("AdamMini", {name: param}, sizes, fused=True) for param in params]
        for step in range(STEPS):
            grad = gradients({name: shape}, step)[name]
            for (low, high), param, optimizer in zip(pairwise(cuts), params, optimizers, strict=True):
                param.grad = grad[low:high].to(device, dtype)
                set_lr(optimizer, step)
                optimizer.step()
        states = [optimizer.state[param] for param, optimizer in zip(params, optimizers, strict=True)]
        params_only = [torch.cat([param.detach() for param in params])]
        results.append(params_only + [torch.cat([param_state[key] for param_state in states]) for key in KEYS[1:]])
    return [key for key, param_state, other in zip(KEYS, *results, strict=True) if not torch.equal(param_state, other)]
