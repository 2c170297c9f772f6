"""AdamMini with torchao's float8, where FSDP2's local tensors are wrappers without storage.

First `fully_shard` with float8 all-gather on all ranks, also on one rank, where torchtitan itself does not shard; on
one rank the result is compared with plain tensors with equal gradients. Then five steps of torchtitan's trainer.
"""

import importlib
import importlib.util
import re
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...optimizer import AdamMini
from ...tools.trainer import RunFailed
from ..decoder import Decoder, Layer, Sizes, loss_of
from ..stage import Context, Result, Skip, engine_of, need_cuda, on_ranks
from ..trainer import need_packages, settings_of, train

STEPS = 5
REFUSED = re.compile(r"NotImplementedError|ImportError|ModuleNotFoundError|Failed to swap")
"""Errors of runs that torchtitan or torchao does not support; any other error is a failure."""
SIZES = Sizes(vocab=512, dim=256, layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden=512, tokens=64)
HEADS: dict[str, Any] = {"n_heads": SIZES.n_heads, "n_kv_heads": SIZES.n_kv_heads}


def run(context: Context) -> Result:
    """Passes if wrappers are updated like plain tensors, and torchtitan's run ends with finite losses."""
    need_cuda(context, "float8")
    need_packages()
    if importlib.util.find_spec("torchao") is None:
        raise Skip("torchao is not installed")
    try:
        importlib.import_module("torchao.float8")
    except Exception as error:  # it may be compiled for another version of torch
        raise Skip(f"torchao cannot be imported: {type(error).__name__}: {error}"[:200]) from error
    if torch.cuda.get_device_capability(0) < (8, 9):
        raise Skip("float8 needs a GPU of compute capability 8.9")
    ranks = on_ranks(context, on_rank)
    numbers: dict[str, Any] = {"wrapped": ranks[0]}
    wrong = sorted({fault for result in ranks for fault in result["faults"]})
    losses = ranks[0]["losses"]
    summary = f"{ranks[0]['wrappers']} wrapped local tensors, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    Result(False, f"{'; '.join([*wrong, summary])}; torchtitan's run did not end", numbers).write(context.result)

    settings = {
        **settings_of(context, 512, STEPS),
        "model.flavor": "check_0.5B",
        "model.converters": "quantize.linear.float8",
        "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True,
        "optimizer.name": "AdamMini",
        "compile.enable": False,
    }
    try:
        result = train(context, "float8", settings, context.left - 5)
    except RunFailed as failure:
        if wrong or not REFUSED.search(str(failure)):
            raise
        reason = " | ".join(str(failure).splitlines()[:3])
        return Result(True, f"{summary}; torchtitan refuses its own float8: {reason}"[:400], numbers)
    losses = list(result.losses.values())
    gathered = next((found[1] for line in result.lines if (found := re.search(r"float8_all_gather=(\w+)", line))), "?")
    numbers["torchtitan"] = {"losses": losses, "all_gather": gathered}
    if len(losses) != STEPS or not all(torch.isfinite(torch.tensor(losses))):
        wrong.append(f"torchtitan's losses: {losses}")
    line = f"{summary}; torchtitan: float8 all-gather {gathered}, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    return Result(not wrong, "; ".join([*wrong, line]), numbers)


def on_rank(context: Context, rank: int) -> dict[str, Any]:
    """A decoder in float8 under `fully_shard`; returns its losses and a list of faults."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    device = context.of_rank(rank)
    model = Decoder(SIZES).to(device)
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(enable_fsdp_float8_all_gather=True),
        module_filter_fn=lambda module, name: "output" not in name,
    )
    mesh = init_device_mesh(context.device, (context.ngpu,), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = AdamMini(model.named_parameters(), lr=1e-3, fused=True, **HEADS)
    answer: dict[str, Any] = {"engine": engine_of(optimizer, context.cuda), "faults": [], "losses": []}
    locals_ = {name: _local(param) for name, param in model.named_parameters()}
    answer["wrappers"] = sum(type(tensor) is not torch.Tensor for tensor in locals_.values())
    if not answer["wrappers"]:
        answer["faults"].append("no local tensor is a wrapper, so nothing was checked")
    twins = {name: torch.nn.Parameter(_plain(tensor).clone()) for name, tensor in locals_.items()}
    twin = AdamMini(list(twins.items()), lr=1e-3, fused=True, **HEADS) if context.ngpu == 1 else None
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(SIZES.vocab, (2, SIZES.tokens + 1), generator=generator).to(device)
    for _ in range(STEPS):
        loss = loss_of(model(text[:, :-1]).float(), text[:, 1:])
        loss.backward()
        answer["losses"].append(float(loss.detach()))
        for name, param in model.named_parameters():
            assert param.grad is not None
            twins[name].grad = _plain(_local(param.grad)).clone()
        optimizer.step()
        if twin is not None:
            twin.step()
        optimizer.zero_grad()
    if not answer["losses"][-1] < answer["losses"][0]:
        answer["faults"].append(f"the loss does not fall: {answer['losses']}")
    if twin is not None:
        now = {name: _plain(_local(param)) for name, param in model.named_parameters()}
        wrong = [name for name, tensor in twins.items() if not torch.equal(now[name], tensor)]
        answer["faults"] += [f"{name} differs from a plain tensor's" for name in wrong[:3]]
    return answer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _plain(tensor: Any) -> torch.Tensor:
    """The tensor inside torchao's wrapper."""
    inner: torch.Tensor = getattr(tensor, "_tensor", tensor)
    return inner
