"""One rank's training step on fake tensors: torchtitan's own model, parallelisation, loss and clipping, torch's own
memory trackers, a fake process group. Nothing is allocated and nothing is sent.

Needs a process of its own, because it imports torchtitan and replaces device and attention: see `estimate.py`.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.train_spec import get_train_spec

from titan_adam_mini import AdamMini
from titan_adam_mini.memory.gpu_stubs import EmptyBlockMask, NoOpEngine, gpu_operators
from titan_adam_mini.memory.tracker import state_of, tracker_of
from titan_adam_mini.momentum import TYPES
from titan_adam_mini.offline.build import Built, built
from titan_adam_mini.offline.rank_memory import Optimizer
from titan_adam_mini.offline.stages import run_of
from titan_adam_mini.private import FakeTensorMode
from titan_adam_mini.titan.builder import optimizer_of
from titan_adam_mini.titan.device import prepare_model_parts
from titan_adam_mini.titan.knobs import read_knobs

TRAINING, STEP = "forward and backward", "optimizer step"
_NAMED_MASKS = {"llama4": ("rope", "nope")}
"""torchtitan's models whose layers choose a mask by name -> the names."""


@dataclass(frozen=True)
class Peak:
    """Memory at the peak of a phase.

    Attributes:
        phase: TRAINING or STEP.
        held: category -> bytes, including optimizer state.
    """

    phase: str
    held: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Simulated:
    """Simulated memory of one rank during a training step.

    Attributes:
        model: name and flavor.
        mesh: axis -> degree, where it is above one.
        ngpu, rank: the rank that was simulated, and of how many.
        batch: sequences per rank and pass (torchtitan's local_batch_size).
        passes: passes per step (gradient accumulation).
        seq_len: tokens per sequence.
        checkpointing: mode of activation checkpointing.
        dtypes: of parameters, and of the computation.
        parameters: global number of elements in this rank's model parts.
        seq_divisor: the length of a sequence must be a multiple of it.
        batch_unit: the batch must be a multiple of it.
        configured: AdamMini with the configured dtype of momentum.
        peaks: optimizer -> the peak of each phase.
        refused: optimizer -> why it cannot run (int8 momentum, where a mesh cuts its runs).
    """

    model: str
    mesh: dict[str, int]
    ngpu: int
    rank: int
    batch: int
    passes: int
    seq_len: int
    checkpointing: str
    dtypes: tuple[str, str]
    parameters: int
    seq_divisor: int
    batch_unit: int
    configured: str
    peaks: dict[str, list[Peak]]
    refused: dict[str, str]

    def peak(self, optimizer: str) -> Peak:
        """The larger of an optimizer's peaks."""
        return max(self.peaks[optimizer], key=lambda peak: peak.total)


def simulate(config: Any, ngpu: int, rank: int, optimizers: Sequence[str], passes: int | None = None) -> Simulated:
    """Simulate one training step of rank `rank` of `ngpu`, for every optimizer.

    Forward and backward do not depend on the optimizer, so they are simulated once; each optimizer's state is added to
    their peak.

    Args:
        config: torchtitan's job configuration, from `configured`.
        optimizers: "AdamW", "AdamMini" (momentum as configured), "AdamMini float32", "... bfloat16", "... int8".
        passes: forward passes per step (gradient accumulation); None to follow from the configured batch sizes.

    Raises:
        ValueError: the configuration cannot be built or simulated.
    """
    with _fake_model(config, ngpu, rank) as (model, tracker):
        config = model.config
        with tracker:
            passes = _call(_train, model, passes)
            training_peak = tracker.memory("peak")
            peaks, refused = {}, {}
            for name in optimizers:
                gc.collect()
                try:
                    peaks[name] = _step(tracker, model, name, training_peak)
                except ValueError as error:
                    if name in ("AdamW", "AdamMini"):
                        raise
                    refused[name] = str(error)
        types = (config.training.dtype, config.training.mixed_precision_param)
        return Simulated(
            f"{config.model.name} {config.model.flavor}",
            model.mesh,
            ngpu,
            rank,
            config.training.local_batch_size,
            passes,
            config.training.seq_len,
            _checkpointing(config),
            types,
            sum(param.numel() for part in model.parts for param in part.parameters()),
            model.dims.seq_len_divisor,
            config.parallelism.pipeline_parallel_microbatch_size if model.dims.pp_enabled else 1,
            _configured(config),
            peaks,
            refused,
        )


def simulate_checked(config: Any, ngpu: int, rank: int, optimizers: Sequence[str]) -> Simulated:
    """`simulate`, checked against the plan: a run that could not start is refused first, and every optimizer's state
    must have the bytes that the plan computes.

    Raises:
        ValueError: the run could not start, or simulation and plan disagree.
    """
    plan = run_of(config, ngpu)
    run = simulate(config, ngpu, rank, optimizers)
    optimizers_in_plan = {name: _in_plan(name, plan.momentum) for name in run.peaks}
    planned = plan.stage_of(rank).memory_of(rank, optimizers_in_plan).state
    for name, peaks in run.peaks.items():
        for peak in peaks:
            if peak.held["optimizer state"] != planned[name].bytes:
                raise ValueError(
                    f"the simulation of rank {rank} records {peak.held['optimizer state']:,} bytes of {name}'s state, "
                    f"and the plan counts {planned[name].bytes:,}: one of them is wrong, so neither is shown. Please "
                    "report it with the configuration"
                )
    return run


def _in_plan(name: str, configured: torch.dtype | None) -> Optimizer:
    """The plan's `Optimizer` for a name of the simulation."""
    mini, _, momentum = name.partition(" ")
    return Optimizer(name, mini=mini == "AdamMini", momentum=TYPES.get(momentum, configured))


@contextmanager
def _fake_model(config: Any, ngpu: int, rank: int) -> Iterator[tuple[Built, Any]]:
    """A model on fake tensors, with a GPU's operators, and the tracker of its memory."""
    with built(config, ngpu, rank) as model, gpu_operators(), FakeTensorMode(allow_non_fake_inputs=True):
        _refuse(model)
        for part in model.parts:
            part.to_empty(device="cpu")
            part.train()
            for module in part.modules():
                if hasattr(module, "use_grouped_mm"):
                    module.use_grouped_mm = True  # torchtitan turns it off without a GPU
        prepare_model_parts(model.parts)
        yield model, tracker_of(model.parts)


def _call(function: Any, model: Built, *args: Any) -> Any:
    """Call a function; errors of models that need values of tensors become a ValueError."""
    try:
        return function(model, *args)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        name, message = f"{model.config.model.name} {model.config.model.flavor}", " ".join(str(error).split())
        raise ValueError(
            f"{name} cannot be simulated: {type(error).__name__}: {message or 'no reason given'}"
        ) from error


def _refuse(model: Built) -> None:
    """Raise ValueError for settings that cannot be simulated without data or without a GPU."""
    config = model.config
    if model.dims.ep_enabled:
        raise ValueError(
            "estimate does not simulate expert parallelism: how many tokens each rank receives depends on the data. "
            "Set --parallelism.expert_parallel_degree 1 for a bound, or see `titan-adam-mini plan` for parameters, "
            "gradients and optimizer state"
        )
    if config.model.name == "gpt_oss":
        raise ValueError(
            "estimate does not simulate gpt_oss: its experts add biases token by token, in sizes that depend on the "
            "data; see `titan-adam-mini plan` for parameters, gradients and optimizer state"
        )
    if config.training.enable_cpu_offload:
        raise ValueError(
            "estimate does not simulate training.enable_cpu_offload: parameters, gradients and optimizer state are "
            "then in host memory; see `titan-adam-mini plan` for their bytes"
        )
    if config.model.converters:
        raise ValueError(
            f"estimate does not simulate model.converters {', '.join(config.model.converters)}, which need a GPU; "
            "leave them out (--model.converters '') to see the model without them"
        )


def _checkpointing(config: Any) -> str:
    mode = config.activation_checkpoint.mode
    return f"{mode} ({config.activation_checkpoint.selective_ac_option})" if mode == "selective" else mode


def _configured(config: Any) -> str:
    momentum = read_knobs(config.optimizer).momentum_dtype or TORCH_DTYPE_MAP[config.training.dtype]
    return f"AdamMini {str(momentum).removeprefix('torch.')}"


# Forward and backward


def _train(model: Built, passes: int | None) -> int:
    """Run forward and backward as torchtitan's trainer does; returns the number of passes."""
    config, dims = model.config, model.dims
    training = config.training
    size = training.local_batch_size
    ranks = dims.dp_replicate * dims.dp_shard
    passes = passes or max(training.global_batch_size, size * ranks) // (size * ranks)
    loss_fn = get_train_spec(config.model.name).build_loss_fn(config, parallel_dims=dims)
    context = dist_utils.get_train_context(dims.tp_enabled and not config.parallelism.disable_loss_parallel)
    amp = dist_utils.maybe_enable_amp(dims, training.mixed_precision_param, "cpu")
    for _ in range(min(passes, 2)):  # gradients exist from the second pass on, and further passes change nothing
        with context():
            if model.schedule is not None:
                _pipeline(model, loss_fn)
                continue
            (part,) = model.parts
            tokens, labels = _tokens(model, size)
            with amp:
                prediction = part(tokens, **_masks(model))
                loss = loss_fn(prediction, labels) / torch.tensor(1.0)
            del prediction
            loss.backward()
            del loss
    return passes


def _tokens(model: Built, size: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [size, tokens of a sequence on this rank]."""
    shape = (size, model.config.training.seq_len // model.dims.cp)
    return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)


def _masks(model: Built) -> dict[str, Any]:
    """The argument with flex attention's mask; some models take a dictionary of masks."""
    if getattr(model.args, "attn_type", "sdpa") == "sdpa":
        return {}
    mask = EmptyBlockMask()
    names = _NAMED_MASKS.get(model.config.model.name)
    return {"attention_masks": dict.fromkeys(names, mask) if names else mask}


def _pipeline(model: Built, loss_fn: Any) -> None:
    """Run this rank's actions of the pipeline's schedule; tensors that other ranks would send are created here.

    Where a schedule separates the gradients of inputs from those of weights, both are computed at the latter's action.
    """
    schedule, config = model.schedule, model.config
    stages = {stage.stage_index: stage for stage in getattr(schedule, "_stages", None) or [schedule._stage]}
    rank = next(iter(stages.values())).group_rank
    size = config.parallelism.pipeline_parallel_microbatch_size
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param if model.dims.fsdp_enabled else config.training.dtype]
    hidden = (size, config.training.seq_len // model.dims.cp // model.dims.tp, model.args.dim)
    actions = [sub for action in schedule.pipeline_order[rank] if action for sub in action.sub_actions or (action,)]
    # First in, first out: torch numbers the microbatches of 1F1B's last stages from one, in forward passes only.
    in_flight: dict[int, deque[tuple[Tensor, Tensor]]] = {index: deque() for index in stages}
    for action in actions:
        stage, microbatches = stages[action.stage_index], in_flight[action.stage_index]
        if action.computation_type == FORWARD:
            tokens, labels = _tokens(model, size)
            value = tokens if stage.is_first else torch.zeros(hidden, dtype=dtype, requires_grad=True)
            output = stage.forward_maybe_with_nosync(value, **_masks(model))
            microbatches.append((value, loss_fn(output, labels) if stage.is_last else output))
            del value, output
        elif action.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
            value, output = microbatches.popleft()
            grads = (None if stage.is_last else torch.zeros_like(output),)
            inputs = {"stage_output": (output,), "output_grads": grads, "input_values": (value,)}
            stage.backward_maybe_with_nosync("full", inputs)
            value.grad = None  # sent to the previous stage, as an output is to the next
            value.untyped_storage().resize_(0)  # torch's module tracker never releases an input with a gradient
            del value, output, grads, inputs
    for stage in stages.values():
        stage.perform_reduce_grad(1)


# The optimizer's step


def _step(tracker: Any, model: Built, name: str, training_peak: dict[str, int]) -> list[Peak]:
    """Peaks of both phases with one optimizer, whose state is allocated, measured and released."""
    tracker.stepping = True
    optimizers = [_optimizer(part, model, name) for part in model.parts]
    for optimizer in optimizers:
        if isinstance(optimizer, AdamMini) and model.config.optimizer.implementation == "fused":
            optimizer.engine = NoOpEngine()
        if not optimizer.state:
            optimizer.step()  # allocates AdamW's state
        tracker.mark_state(state_of(optimizer))
    state = tracker.memory()["optimizer state"]
    tracker.restart()
    _clip_and_step(model, optimizers)
    tracker.stepping = False
    return [
        Peak(TRAINING, {**training_peak, "optimizer state": training_peak["optimizer state"] + state}),
        Peak(STEP, tracker.memory("peak")),
    ]


def _clip_and_step(model: Built, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    dist_utils.clip_grad_norm_(
        [param for part in model.parts for param in part.parameters()],
        model.config.training.max_norm,
        foreach=True,
        pp_mesh=model.dims.get_optional_mesh("pp"),
        ep_enabled=model.dims.ep_enabled,
    )
    for optimizer in optimizers:
        optimizer.step()


def _optimizer(part: nn.Module, model: Built, name: str) -> torch.optim.Optimizer:
    config = model.config.optimizer
    if name == "AdamW":
        params = [param for param in part.parameters() if param.requires_grad]
        fused, foreach = config.implementation == "fused", config.implementation == "foreach"
        return torch.optim.AdamW(params, lr=config.lr, fused=fused, foreach=foreach)
    _, _, momentum = name.partition(" ")
    optimizer = optimizer_of(part, config, model.dims, momentum_dtype=TYPES.get(momentum))
    optimizer.init_state()
    return optimizer
