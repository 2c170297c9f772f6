"""An estimate: the bytes that one more sequence takes at the peak of a training step.

A step (forward, loss, backward) of torchtitan's model runs on the meta device, where tensors have sizes and no values,
under a dispatch mode that records when every storage is allocated and freed: once with two sequences, once with three.
The growth of a storage between the two belongs to one sequence (weights' gradients do not grow); the estimate is the
most growth alive at once. One and two layers are run, and the rest is extrapolated.

Assumed: attention is the flash kernel (log-sum-exp and output are saved, no score matrix); nothing is compiled
(compiling would fuse and recompute more); with context parallelism a rank has its share of the tokens, and the ring's
buffers are not counted; weights and activations have one dtype. Tensor and sequence parallelism and activation
checkpointing are torchtitan's own. Fragmentation is not counted.
"""

import copy
import gc
import weakref
from itertools import accumulate
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims, activation_checkpoint
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import set_default_dtype

from titan_adam_mini.memory.gpu_stubs import gpu_operators
from titan_adam_mini.offline.build import fake_rank, spec_and_args
from titan_adam_mini.private import TorchDispatchMode, tree_map_only
from titan_adam_mini.sharding import local


def sequence_bytes(config: Any, *, mixed: bool) -> int | str:
    """Bytes per sequence, or a sentence that says why they are unknown.

    Args:
        config: torchtitan's job configuration, from which a model can be built.
        mixed: whether a step computes in `training.mixed_precision_param`: under FSDP and on a single device it does;
            tensor parallelism alone computes in the parameters' dtype (torchtitan: `maybe_enable_amp`).
    """
    if config.parallelism.pipeline_parallel_degree > 1:
        return "how many microbatches a pipeline stage holds at once depends on its schedule"
    if config.activation_checkpoint.mode == "memory_budget":
        return "what the compiler saves within its memory budget is not known in advance"
    try:
        return _sequence_bytes(config, config.training.mixed_precision_param if mixed else config.training.dtype)
    except Exception as error:  # some models need values of tensors; the plan is printed without this estimate
        message = " ".join(str(error).split())
        return f"{config.model.name} does not run on tensors without values ({type(error).__name__}: {message[:120]})"


def _sequence_bytes(config: Any, dtype: str) -> int | str:
    config = copy.deepcopy(config)
    config.compile.enable = config.parallelism.enable_async_tensor_parallel = False
    layers = spec_and_args(config)[1].n_layers
    option = config.activation_checkpoint.selective_ac_option
    by_layer = config.activation_checkpoint.mode == "selective" and option.isdigit()
    period = max(1, int(option)) if by_layer else 1  # one layer in `period` is recomputed
    few, more = (period, 2 * period) if layers >= 2 * period and layers % period == 0 else (layers, layers)
    with fake_rank(0, config.parallelism.tensor_parallel_degree):
        if not _same_layers(config):
            return f"the layers of {config.model.name} {config.model.flavor} differ"
        first, second = (_growth(config, dtype, count) for count in (few, more))
    return first + (second - first) // max(1, more - few) * (layers - few)


def _same_layers(config: Any) -> bool:
    """Whether the parameters of all layers have the same shapes."""
    spec, args = spec_and_args(config)
    args.update_from_config(config)
    with torch.device("meta"):
        model = spec.model_cls(args)
    return len({tuple(param.shape for param in layer.parameters()) for layer in model.layers.values()}) == 1


def _growth(config: Any, dtype: str, layers: int) -> int:
    """The most bytes of one more sequence that are alive at once in a step of a model with `layers` layers."""
    # With one sequence torch skips some copies, and the two runs could not be compared.
    two, three = (_events(config, dtype, layers, batch) for batch in (2, 3))
    return max(accumulate(more - less for less, more in zip(two, three, strict=True)))


def _events(config: Any, dtype: str, layers: int, batch: int) -> list[int]:
    """The storages allocated (bytes) and freed (-bytes) in a step, in order; weights and inputs excluded."""
    spec, args = spec_and_args(config)
    args.update_from_config(config)
    args.n_layers = layers
    tp, cp = config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree
    # Only what shards activations is applied; FSDP casts the weights, which is the same as having them in that dtype.
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=tp, pp=1, ep=1, etp=1, world_size=tp)
    activation_checkpoint._layer_sac_count = 0
    with torch.device("meta"):
        with set_default_dtype(TORCH_DTYPE_MAP[dtype]):
            model = spec.parallelize_fn(spec.model_cls(args), dims, config)
        tokens = torch.zeros((batch, config.training.seq_len // cp), dtype=torch.int64)
    loss = spec.build_loss_fn(config, parallel_dims=dims)
    loss_parallel = tp > 1 and not config.parallelism.disable_loss_parallel
    gc.disable()  # storages are freed when the last reference goes, in the same order in both runs
    try:
        with gpu_operators(), dist_utils.get_train_context(loss_parallel)(), _StorageEvents() as storages:
            loss(model(tokens), tokens).backward()
    finally:
        gc.enable()
    return storages.events


class _StorageEvents(TorchDispatchMode):
    """Records when the storages of operations' results are allocated and freed.

    Attributes:
        events: bytes of each storage, negative when it is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (args, kwargs):  # weights and inputs, which existed before
            tree_map_only(torch.Tensor, lambda tensor: self._record(tensor, new=False), value)
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._record(tensor, new=True), result)
        return result

    def _record(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage = local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self._seen.pop(key, None)
            self.events.append(-size)

        self._seen[key] = weakref.ref(storage, freed)
        self.events.append(size)
