"""torchtitan's built-in models, small, through torchtitan's own parallelize function, against the float64 oracle.

Forward and backward are real and run on the CPU. Widths, layers and vocabulary shrink for speed, while the heads keep
the debug flavour's number and size (flux: the size). Parameters are float64; FSDP computes in float32, so gradients are
float32 numbers. What torchtitan or torch cannot do on a CPU is replaced, and nothing else:

- experts are computed one by one, as torchtitan does on older GPUs: the grouped product is the GPU's;
- `torch.histc`, by which routers count tokens, takes no integers on CPUs: it gets floats;
- gpt_oss's flex attention has no backward pass on CPUs: the same attention is written out;
- qwen3's debug flavour ties its embeddings, which torchtitan 0.2.2's parallelize function puts into two FSDP groups;
  torch 2.13 refuses that, so `fully_shard` is applied here, layer by layer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.layout import BlockLayout

pytest.importorskip("torchtitan", reason="needs torchtitan's models: pip install -e '.[titan]'")
pytestmark = pytest.mark.slow

STEPS, BATCH, TOKENS = 5, 2, 16
HYPER = {"betas": (0.9, 0.95), "eps": 1e-8}
LIMIT = 1e-12

# model, flavour -> what shrinks
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("llama3", "debugmodel"): {"n_layers": 2, "vocab_size": 256},
    ("llama4", "debugmodel"): {"n_layers": 2, "vocab_size": 256},
    ("qwen3", "debugmodel"): {"n_layers": 2, "vocab_size": 256, "dim": 64, "hidden_dim": 96},
    ("qwen3", "debugmodel_moe"): {"n_layers": 2, "vocab_size": 256, "dim": 64, "hidden_dim": 96, "moe_inter_dim": 24},
    ("deepseek_v3", "debugmodel"): {
        "n_layers": 2,
        "vocab_size": 256,
        "dim": 64,
        "inter_dim": 96,
        "moe_inter_dim": 24,
        "kv_lora_rank": 80,
    },
    ("gpt_oss", "debugmodel"): {
        "n_layers": 2,
        "vocab_size": 256,
        "dim": 64,
        "moe_inter_dim": 24,
        "max_seq_len": 64,
    },
    ("flux", "flux-debug"): {
        "num_heads": 3,
        "hidden_size": 384,
        "depth": 1,
        "depth_single_blocks": 1,
        "mlp_ratio": 2.0,
        "context_in_dim": 32,
        "vec_in_dim": 24,
    },
}


class FastOracle(Oracle):
    """The oracle with sums over a dim's tiles in place of a loop over blocks."""

    def step(self, grads: Any, *, lr: float, betas: Any, eps: float, weight_decay: Any) -> None:
        beta1, beta2 = betas
        for name, p in self.params.items():
            g, m, v, layout = grads[name].double(), self.exp_avg[name], self.exp_avg_sq[name], self.layouts[name]
            self.steps[name] += 1
            t = self.steps[name]
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * _per_block(g * g, layout) / _per_block(torch.ones_like(g), layout))
            denominator = _per_element((v / (1 - beta2**t)).sqrt() + eps, layout)
            p.mul_(1 - lr * weight_decay[name]).sub_(lr * (m / (1 - beta1**t)) / denominator)


def _per_block(x: Tensor, layout: BlockLayout) -> Tensor:
    for dim, tiles in enumerate(layout.dims):
        x = torch.stack([part.sum(dim) for part in x.split(tiles.lengths(), dim)], dim) if not tiles.is_unit else x
    return x


def _per_element(v: Tensor, layout: BlockLayout) -> Tensor:
    for dim, tiles in enumerate(layout.dims):
        v = v.repeat_interleave(torch.tensor(tiles.lengths()), dim)
    return v


def _attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, **_: Any) -> tuple[Tensor, Tensor]:
    """What flex attention gives gpt_oss: the output, and the log of each row's sum."""
    from torch.nn.attention.flex_attention import create_mask

    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = create_mask(block_mask.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """The replacements of this file's first lines, for as long as they are needed: ranks are reused by other tests."""
    from torchtitan.models import attention

    histc = torch.histc

    def counts(x: Tensor, **kwargs: Any) -> Tensor:
        return histc(x.float(), **kwargs).to(x.dtype)

    flex = mock.patch.object(attention.FlexAttentionWrapper, "_compiled_flex_attn", staticmethod(_attention))
    eager = mock.patch.object(attention, "_compiled_create_block_mask", attention.create_block_mask)
    with mock.patch.object(torch, "histc", counts), flex, eager:
        yield


def _build(name: str, flavour: str) -> tuple[nn.Module, Any, Any]:
    """The whole small model in float64, equal on all ranks, with its arguments and its parallelize function."""
    from torchtitan.protocols.train_spec import get_train_spec

    spec = get_train_spec(name)
    args = dataclasses.replace(copy.deepcopy(spec.model_args[flavour]), **SMALL[name, flavour])
    if hasattr(args, "moe_args"):
        args.moe_args.use_grouped_mm = False
    if name == "deepseek_v3":
        args.moe_impl = "standard"  # torchtitan sets it from the job config
    torch.manual_seed(7)
    model = spec.model_cls(args)
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
        for param in model.parameters():  # no zeros and ones: every parameter shall matter
            param.data = param.double() + 0.05 * torch.randn(param.shape, dtype=torch.float64)
    tied = getattr(args, "enable_weight_tying", False)
    return model, args, _shard_tied if tied else spec.parallelize_fn


def _shard_tied(model: nn.Module, dims: Any, config: Any) -> nn.Module:
    """FSDP2 with the tied embedding and output in the root's group."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for layer in model.layers.values():
        fully_shard(layer, mesh=dims.get_mesh("fsdp"), mp_policy=policy)
    return fully_shard(model, mesh=dims.get_mesh("fsdp"), mp_policy=policy)


def _loss(name: str, model: nn.Module, args: Any, draw: torch.Generator) -> Tensor:
    if name == "flux":
        image, text = (torch.randn(BATCH, TOKENS, n, generator=draw) for n in (args.in_channels, args.context_in_dim))
        out = model(
            img=image,
            img_ids=torch.arange(TOKENS).view(1, -1, 1).expand(BATCH, -1, 3).float(),
            txt=text,
            txt_ids=torch.zeros(BATCH, TOKENS, 3),
            timesteps=torch.rand(BATCH, generator=draw),
            y=torch.randn(BATCH, args.vec_in_dim, generator=draw),
        )
        return F.mse_loss(out, torch.randn(out.shape, generator=draw))
    tokens = torch.randint(args.vocab_size, (BATCH, TOKENS + 1), generator=draw)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    extra = {"attention_masks": model.get_attention_masks(inputs, None)} if name == "gpt_oss" else {}
    return F.cross_entropy(model(inputs, **extra).flatten(0, 1), labels.flatten())


def train(rank: int, world: int, name: str, flavour: str) -> dict[str, Any]:
    """The largest errors of this rank's parameters and of the second moments, and what the run was like."""
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

    from titan_adam_mini.titan import device

    device.install()
    model, args, parallelize = _build(name, flavour)
    config = JobConfig()
    config.training.seq_len = TOKENS
    config.training.mixed_precision_param = config.training.mixed_precision_reduce = "float32"
    config.activation_checkpoint.mode = "none"
    config.compile.enable = False
    dims = ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world)
    whole = {key: param.detach().clone() for key, param in model.named_parameters()}
    partition = Partition.from_config(args, undecayed=["norm", "bias"])
    blocks = partition.assign({key: tuple(param.shape) for key, param in whole.items()})
    oracle = FastOracle(whole, {key: one.layout for key, one in blocks.items()})

    model = parallelize(model, dims, config)
    assert isinstance(model, FSDPModule)
    device.prepare_model_parts([model])
    optimizer = AdamMini(model.named_parameters(), weight_decay=0.1, partition=partition, **HYPER)
    draw = torch.Generator().manual_seed(100 + rank)
    zero = set(whole)
    for step in range(STEPS):
        lr = 1e-3 * (1 + step) / STEPS
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        with _on_the_cpu():
            _loss(name, model, args, draw).backward()
        grads = {key: param.grad.full_tensor() for key, param in model.named_parameters()}
        zero -= {key for key, grad in grads.items() if grad.abs().max() > 0}
        optimizer.step()
        oracle.step(grads, lr=lr, weight_decay={key: 0.1 * one.decay for key, one in blocks.items()}, **HYPER)

    params, moments, cut = 0.0, 0.0, 0
    for key, param in model.named_parameters():
        chunks = torch.chunk(oracle.params[key], world)
        want = chunks[rank] if rank < len(chunks) else oracle.params[key][:0]
        assert param.to_local().shape == want.shape and param.dtype == torch.float64, key
        params = max(params, error(param.to_local().detach(), want))
        moments = max(moments, error(optimizer.state[param]["exp_avg_sq"].full_tensor(), oracle.exp_avg_sq[key]))
        edge = len(torch.arange(whole[key].shape[0]).chunk(world)[0])
        cut += (
            blocks[key].role in ("query", "key", "qkv", "qkv_mlp") and edge not in blocks[key].layout.dims[0].starts()
        )
    return {"params": params, "moments": moments, "zero": sorted(zero), "cut": cut, "names": len(whole)}


@pytest.mark.parametrize(
    ("name", "flavour", "world"),
    [(*key, 2) for key in SMALL] + [("llama3", "debugmodel", 3), ("deepseek_v3", "debugmodel", 3)],
)
def test_some_steps_equal_the_oracle(name: str, flavour: str, world: int) -> None:
    if name == "flux":
        pytest.importorskip("transformers", reason="torchtitan's flux imports transformers")
        pytest.importorskip("einops", reason="torchtitan's flux imports einops")
    for told in run(train, world, name, flavour, timeout=240):
        assert told["params"] < LIMIT and told["moments"] < LIMIT, told
        assert told["zero"] == [], "every parameter has a gradient that is not zero"
        assert told["cut"] > 0 or world == 2, "three ranks cut heads"


def test_the_fast_oracle_is_the_oracle() -> None:
    layouts = {
        "fused": BlockLayout.of((9, 4), [(2, 2), (1, 3), (2, 1)], None),
        "turned": BlockLayout.of((3, 6), None, [(2, 3)]),
        "experts": BlockLayout.of((2, 3, 4), 1, 1, None),
        "vector": BlockLayout.of((5,), None),
        "bias": BlockLayout.of((2, 3), 1, 1),
    }
    draw = torch.Generator().manual_seed(3)
    params = {name: torch.randn(layout.shape, generator=draw) for name, layout in layouts.items()}
    slow, fast = Oracle(params, layouts), FastOracle(params, layouts)
    for _ in range(3):
        grads = {name: torch.randn(param.shape, generator=draw) for name, param in params.items()}
        for one in (slow, fast):
            one.step(grads, lr=1e-2, weight_decay=dict.fromkeys(params, 0.1), **HYPER)
    for name in layouts:
        assert error(fast.params[name], slow.params[name]) < 1e-14
        assert error(fast.exp_avg_sq[name], slow.exp_avg_sq[name]) < 1e-14
