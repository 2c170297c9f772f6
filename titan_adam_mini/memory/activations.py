"""An estimate: the bytes that one more sequence takes at the peak of a training step.

Forward and backward are simulated with two and with three sequences (with one, torch skips some copies), on models of
few layers, and the rest of the layers extrapolated: seconds, where the whole model takes longer than a plan should. What
`simulate` assumes is assumed: attention's flash kernel, nothing compiled, no fragmentation.
"""

import copy
from typing import Any

import torch

from titan_adam_mini.memory.simulate import training_peak
from titan_adam_mini.titan.build import spec_and_args


def sequence_bytes(config: Any, ngpu: int) -> int | str:
    """Bytes per sequence, or in words why nothing can be said.

    Args:
        config: torchtitan's job configuration, of which a model can be built.
        ngpu: number of ranks.
    """
    if config.parallelism.pipeline_parallel_degree > 1:
        return "how many microbatches a pipeline stage holds at once is its schedule's to say"
    if config.activation_checkpoint.mode == "memory_budget":
        return "what the compiler keeps within its memory budget is not known before"
    try:
        return _sequence_bytes(config, ngpu)
    except Exception as error:  # the plan stands without it
        return " ".join(str(error).split())[:200]


def _sequence_bytes(config: Any, ngpu: int) -> int | str:
    spec, args = spec_and_args(config)
    args.update_from_config(config)
    with torch.device("meta"):
        model = spec.model_cls(args)
    if len({tuple(param.shape for param in layer.parameters()) for layer in model.layers.values()}) > 1:
        return f"the layers of {config.model.name} {config.model.flavor} are not alike"
    layers, option = args.n_layers, config.activation_checkpoint.selective_ac_option
    by_layer = config.activation_checkpoint.mode == "selective" and option.isdigit()
    period = max(1, int(option)) if by_layer else 1  # every so many layers one is recomputed
    few, more = (period, 2 * period) if layers >= 2 * period and layers % period == 0 else (layers, layers)
    first, second = (grown(config, ngpu, count) for count in (few, more))
    return first + (second - first) // max(1, more - few) * (layers - few)


def grown(config: Any, ngpu: int, layers: int) -> int:
    """By how many bytes one more sequence raises the peak of a model with so many layers."""
    peaks = []
    for batch in (2, 3):
        own = copy.deepcopy(config)
        own.training.local_batch_size, own.training.global_batch_size = batch, -1
        peaks.append(training_peak(own, ngpu, layers))
    return peaks[1] - peaks[0]
