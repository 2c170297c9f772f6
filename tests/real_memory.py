"""What real ranks hold: torchtitan's model built, trained for a step and weighed, tensor by tensor, beside the plan.

Nothing here asks the plan, or the sharding rules behind it: bytes are those of the tensors that are there.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

CONFIG = Path(__file__).resolve().parents[1] / "train_configs" / "debug_model.toml"
SEQ_LEN, BATCH = 16, 4
MODELS = {"nasty": "llama3", "odd": "llama3", "even": "llama3", "nasty_moe": "qwen3"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw fused": {"name": "AdamW", "implementation": "fused"},
    "adamw foreach": {"name": "AdamW", "implementation": "foreach"},
    "adam_mini_float32": {"name": "AdamMini", "implementation": "foreach", "momentum": "float32"},
    "adam_mini_bfloat16": {"name": "AdamMini", "implementation": "foreach", "momentum": "bfloat16"},
    "adam_mini_int8": {"name": "AdamMini", "implementation": "foreach", "momentum": "int8"},
}
FEW = ("adamw foreach", "adam_mini_bfloat16", "adam_mini_int8")
"""Of those which differ in one thing, the more difficult one."""


@dataclass(frozen=True)
class Case:
    """A mesh and a model: number of ranks, flavour, degrees by their short names, and other settings.

    Attributes:
        int8: can momentum be int8 there?
        forward: can torch run a step there on CPUs? If not, gradients are made by hand, as their parameters are.
        every: with all optimizers, or with those of FEW.
    """

    ranks: int
    flavor: str
    degrees: tuple[tuple[str, int], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    int8: bool = True
    forward: bool = True
    every: bool = False

    @property
    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Those that are weighed, of OPTIMIZERS."""
        possible = {key: one for key, one in OPTIMIZERS.items() if self.int8 or one.get("momentum") != "int8"}
        return {key: one for key, one in possible.items() if self.every or key in FEW}

    @property
    def arguments(self) -> list[str]:
        """torchtitan's command line."""
        words = ["--job.config_file", str(CONFIG), "--experimental.custom_import", "small_flavors"]
        words += ["--model.name", MODELS[self.flavor], "--model.flavor", self.flavor]
        words += ["--training.seq_len", str(SEQ_LEN), "--training.local_batch_size", str(BATCH)]
        for name, degree in self.degrees:
            words += [f"--parallelism.{_LONG[name]}_degree", str(degree)]
        for name, value in self.settings:
            words += [f"--{name}", value] if value else [f"--{name}"]
        return words


_LONG = {
    "hsdp": "data_parallel_replicate",
    "shard": "data_parallel_shard",
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
_VIRTUAL = (("parallelism.pipeline_parallel_schedule", "Interleaved1F1B"),)
_FACTORED = (("optimizer.adam_mini.second_moment", "factored"),)
CASES = {
    "one rank": Case(1, "nasty"),
    "FSDP2 2": Case(2, "nasty"),
    "FSDP2 3": Case(3, "nasty", every=True),
    "FSDP2 4": Case(4, "nasty"),
    "FSDP2 3, bfloat16": Case(3, "nasty", settings=(("training.dtype", "bfloat16"),)),
    "FSDP2 3, CPU offload": Case(3, "nasty", settings=(("training.enable_cpu_offload", ""),)),
    "DDP 2": Case(2, "nasty", (("hsdp", 2), ("shard", 1))),
    "HSDP 2x2": Case(4, "nasty", (("hsdp", 2),)),
    "TP 2": Case(2, "even", (("tp", 2),)),
    "FSDP2 x TP 2x2": Case(4, "even", (("tp", 2),), every=True),
    "FSDP2 x TP 2x2, uneven": Case(4, "odd", (("tp", 2),), int8=False),
    "CP 2": Case(2, "nasty", (("cp", 2),), forward=False),
    "FSDP2 3, factored": Case(3, "nasty", settings=_FACTORED),
    "FSDP2 x TP 2x2, factored": Case(4, "even", (("tp", 2),), _FACTORED),
    "MoE, FSDP2 x EP 2x2, factored": Case(4, "nasty_moe", (("ep", 2),), _FACTORED),
    "PP 2": Case(2, "nasty", (("pp", 2),)),
    "PP 2, virtual stages": Case(2, "nasty", (("pp", 2),), _VIRTUAL),
    "PP x FSDP2 2x2": Case(4, "nasty", (("pp", 2),)),
    "FSDP2 3, a frozen embedding": Case(3, "nasty", settings=(("model.name", "frozen"),)),
    "MoE, FSDP2 3": Case(3, "nasty_moe"),
    "MoE, EP 2": Case(2, "nasty_moe", (("ep", 2),)),
    "MoE, FSDP2 x EP 2x2": Case(4, "nasty_moe", (("ep", 2),)),
    "MoE, FSDP2 x EP x TP": Case(4, "nasty_moe", (("ep", 2), ("tp", 2)), int8=False, forward=False),
}


def weigh(rank: int, world: int, case: Case, folder: str) -> dict[str, Any]:
    """What this rank holds after a step with every optimizer, in bytes, and where `folder` is given what checkpoints of
    each of them hold: see the keys at the end."""
    from torchtitan.components.checkpoint import ModelWrapper
    from torchtitan.config import ConfigManager

    from titan_adam_mini.state import SECOND_MOMENTS
    from titan_adam_mini.titan import build_optimizers, device, enable

    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK="0", NGPU=str(world))
    config = ConfigManager().parse_args(case.arguments)
    importlib.import_module(config.experimental.custom_import)
    enable("cpu")
    parts, dims, step = _built(config, world)
    device.prepare_model_parts(parts)
    params = [param for part in parts for param in part.parameters()]
    if case.forward:
        step()
    else:
        for param in params:
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params if param.requires_grad]
    assert all(grad is not None for grad in grads)
    told: dict[str, Any] = {
        "parameters": _bytes(params),
        "parameters padded": storages(params)[0],
        "parameters rounded": storages(params)[1],
        "gradients": _bytes(grads),
        "gradients padded": storages(grads)[0],
        "gradients rounded": storages(grads)[1],
        "buffers": _bytes([buffer for part in parts for buffer in part.buffers()]),
        "state": {},
        "checkpoint": {},
        "second moments": {},
    }
    for key, asked in case.optimizers.items():
        section = copy.deepcopy(config.optimizer)
        section.name, section.implementation = asked["name"], asked["implementation"]
        section.adam_mini.momentum_dtype = asked.get("momentum", "")
        optimizers = build_optimizers(parts, section, dims)
        optimizers.step()
        states = [one for optimizer in optimizers for one in optimizer.state.values()]
        told["state"][key] = _bytes([value for one in states for value in one.values()])
        told["second moments"][key] = {  # by name: stages have others, ranks of one stage the same
            name: sum(value.numel() for key, value in optimizer.state[param].items() if key in SECOND_MOMENTS)
            for part, optimizer in zip(parts, optimizers, strict=True)
            for name, param in part.named_parameters()
            if param.requires_grad
        }
        if folder:
            path = f"{folder}/{key}"
            dcp.save({"model": ModelWrapper(parts), "optimizer": optimizers}, checkpoint_id=path)
            found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.values()
            told["checkpoint"][key] = sum(
                one.size.numel() * one.properties.dtype.itemsize for one in found if hasattr(one, "chunks")
            )
    return told


def _built(config: Any, world: int) -> tuple[list[Any], Any, Any]:
    """Model parts as torchtitan's trainer has them, with random weights; ParallelDims; forward and backward."""
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools.utils import set_default_dtype

    from titan_adam_mini.offline.build import parallel_dims, spec_and_args

    dims = parallel_dims(config, world)
    spec, args = spec_and_args(config)
    args.update_from_config(config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(args)
    loss = spec.build_loss_fn(config, parallel_dims=dims)
    cpu, schedule = torch.device("cpu"), None
    if dims.pp_enabled:
        schedule, parts, first, last = spec.pipelining_fn(model, dims, config, cpu, args, spec.parallelize_fn, loss)
    else:
        with _unpinned():
            parts = [spec.parallelize_fn(model, dims, config)]
    for part in parts:
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights(buffer_device=cpu)
    tokens = torch.randint(args.vocab_size, (BATCH, SEQ_LEN))

    def step() -> None:
        loss_parallel = dims.tp_enabled and not config.parallelism.disable_loss_parallel
        with _on_the_cpu(), dist_utils.get_train_context(loss_parallel)():
            if schedule is not None:
                inputs = (tokens,) if first else ()
                targets, losses = (tokens, []) if last else (None, None)
                schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
                return
            loss(parts[0](tokens), tokens).backward()

    return parts, dims, step


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Experts' tokens are ordered by a Triton kernel; torchtitan has the same for CPUs."""
    from torchtitan.models.moe import utils

    ordered = functools.partial(utils.generate_permute_indices, use_cpu=True)
    with mock.patch.object(utils, "generate_permute_indices", ordered):
        yield


def _unpinned() -> Any:
    """CPU offload without pinned memory, which is a GPU's."""
    from torchtitan.models.llama3.infra import parallelize

    policy = functools.partial(parallelize.CPUOffloadPolicy, pin_memory=False)
    return mock.patch.object(parallelize, "CPUOffloadPolicy", policy)


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: list[Any]) -> int:
    return sum(local(one).numel() * local(one).element_size() for one in tensors)


def storages(tensors: list[Any]) -> tuple[int, int]:
    """Bytes of the storages behind the tensors, each once, and what is missing to multiples of 512."""
    found = {one._cdata: one.nbytes() for one in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(found.values()), sum(-size % 512 for size in found.values())
