"""Where the name "AdamMini" enters torchtitan: its ``build_optimizers`` wrapped once, in every place that holds it."""

import sys
from typing import Any

import torchtitan.components.optimizer as titan_optimizer
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.protocols import train_spec

from titan_adam_mini.titan import checkpoint, curve, device, flavor, interruption, metrics, snapshots, validation
from titan_adam_mini.titan.builder import NAME, build_adam_mini

_MARK = "titan_adam_mini_wraps"
_KEEPERS = (__name__, *(one.__name__ for one in (checkpoint, curve, interruption, metrics, snapshots, validation)))
"""Modules that need what they replace."""

# A reload of this module finds its own older wrapper there, and must not wrap it a second time.
_found = titan_optimizer.build_optimizers
_original = getattr(_found, _MARK, _found)


def build_optimizers(
    model_parts: list[Any],
    optimizer_config: Any,
    parallel_dims: Any,
    ft_manager: Any = None,
    **options: Any,
) -> Any:
    """Build the optimizers of a run: AdamMini for ``optimizer_config.name == "AdamMini"``, else torchtitan's own.

    The signature is that of torchtitan 0.2's ``TrainSpec.build_optimizers_fn``, so a fork may put this function there.

    Args:
        model_parts: the parallelised model, one part per pipeline stage of this rank.
        optimizer_config: torchtitan's ``[optimizer]`` section, with or without ``adam_mini`` in it.
        parallel_dims: torchtitan's ``ParallelDims``.
        ft_manager: torchft's manager, or None.
        options: for AdamMini only: ``partition``, a ``Partition`` of your own in place of the one that the model's
            ``model_args`` give (``functools.partial(build_optimizers, partition=...)`` makes it a ``TrainSpec`` field).

    Returns:
        A torchtitan ``OptimizersContainer``.

    Raises:
        ValueError: a setting that AdamMini cannot serve, in words.
        NotImplementedError: from torchtitan, for a name it does not know.
    """
    device.prepare_model_parts(model_parts)
    if optimizer_config.name == NAME:
        return snapshots.watch(build_adam_mini(model_parts, optimizer_config, parallel_dims, ft_manager, **options))
    return snapshots.watch(_original(model_parts, optimizer_config, parallel_dims, ft_manager))


setattr(build_optimizers, _MARK, _original)


def enable() -> None:
    """Put :func:`build_optimizers` in the place of torchtitan's, and cure torchtitan on a machine without accelerator.

    A second call changes nothing. torchtitan's MoE builder looks the function up in its module each time, so models
    with load-balanced experts keep their hook.
    """
    device.install()
    _replace_everywhere(
        {
            _found: build_optimizers,
            _original: build_optimizers,
            CheckpointManager: checkpoint.AdamMiniCheckpointManager,
            MetricsProcessor: metrics.AdamMiniMetricsProcessor,
            curve.original: curve.TensorBoardLogger,
            validation.original: validation.Validator,
            snapshots.original: snapshots.maybe_enable_memory_snapshot,
            interruption.original: interruption.init_distributed,
        }
    )
    flavor.add()


def _replace_everywhere(replacements: dict[Any, Any]) -> None:
    """Rebind every module attribute and every registered TrainSpec that is a key of ``replacements``.

    Names travel by ``from ... import``, so the defining module is not enough; a user's own ``custom_import`` module may
    hold the name too, hence all loaded modules and not only torchtitan's: once, since there are 100,000 attributes.
    """
    by_id = {id(old): new for old, new in replacements.items()}
    for name, module in list(sys.modules.items()):
        if name in _KEEPERS or module is None:
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                setattr(module, attribute, by_id[id(value)])
    for spec in train_spec._extra_train_specs.values():
        if id(spec.build_optimizers_fn) in by_id:
            spec.build_optimizers_fn = by_id[id(spec.build_optimizers_fn)]
