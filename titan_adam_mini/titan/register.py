"""Registers the optimizer name "AdamMini" in torchtitan, with checks of its checkpoints.

docs/torchtitan.md lists what is replaced.
"""

import dataclasses
import logging
import os
from typing import Any

import torchtitan.components.optimizer as titan_optimizer
from torchtitan.protocols import train_spec

from titan_adam_mini.titan import checkpoint, device, features, flavor, interruption, snapshots
from titan_adam_mini.titan.builder import NAME, build_adam_mini
from titan_adam_mini.titan.log import log_on_rank_0
from titan_adam_mini.titan.replaced import original_of, replace


def enable(*names: str) -> None:
    """Register the optimizer name "AdamMini" in torchtitan, and switch features on; a second call changes nothing.

    Args:
        names: keys of ``features.FEATURES``, in addition to those whose environment variable is 1.

    Raises:
        ValueError: unknown feature, or a variable is neither 1 nor 0 nor empty.
        ImportError: this torchtitan lacks a function to be replaced.
    """
    asked = [*names, *features.from_environment()]
    replace(titan_optimizer, "build_optimizers", build_with_adam_mini)
    replace(train_spec, "get_train_spec", get_train_spec_with_adam_mini)
    checkpoint.install()
    flavor.add()
    features.install(*asked)


def build_optimizers(
    model_parts: list[Any],
    optimizer_config: Any,
    parallel_dims: Any,
    ft_manager: Any = None,
    **options: Any,
) -> Any:
    """Build the optimizers of a run: AdamMini for ``optimizer_config.name == "AdamMini"``, else torchtitan's own.

    The signature is that of torchtitan 0.2's ``TrainSpec.build_optimizers_fn``, so a fork can use this function there.

    Args:
        model_parts: the parallelised model, one part per pipeline stage of this rank.
        optimizer_config: torchtitan's ``[optimizer]`` section, with or without ``adam_mini`` in it.
        parallel_dims: torchtitan's ``ParallelDims``.
        ft_manager: torchft's manager, or None.
        options: for AdamMini only: ``partition``, a custom ``Partition`` instead of the one made from the model's
            ``model_args`` (for a ``TrainSpec``: ``functools.partial(build_optimizers, partition=...)``).

    Returns:
        A torchtitan ``OptimizersContainer``.

    Raises:
        ValueError: a setting that AdamMini does not support.
        NotImplementedError: from torchtitan, for an unknown name.
    """
    torchtitans = original_of(titan_optimizer, "build_optimizers")
    return build_with_adam_mini(
        torchtitans, model_parts, optimizer_config, parallel_dims, ft_manager=ft_manager, **options
    )


def build_with_adam_mini(
    original: Any,
    model_parts: list[Any],
    optimizer_config: Any,
    parallel_dims: Any,
    ft_manager: Any = None,
    **options: Any,
) -> Any:
    """Wraps torchtitan's `build_optimizers`, which supports "Adam" and "AdamW": adds "AdamMini".

    torchtitan's builder for load-balanced experts looks the function up in its module on each call, so its hook is
    kept.
    """
    device.prepare_model_parts(model_parts)
    _warn_of_unused_variables()
    if optimizer_config.name == NAME:
        container = build_adam_mini(model_parts, optimizer_config, parallel_dims, ft_manager, **options)
    else:
        container = original(model_parts, optimizer_config, parallel_dims, ft_manager)
    snapshots.watch(container)
    return container


def get_train_spec_with_adam_mini(get_train_spec: Any, name: str) -> Any:
    """Wraps torchtitan's `get_train_spec`: replaces `build_optimizers` in specs that imported it earlier.

    This makes the import order irrelevant: torchtitan's models and registered specs have their own reference to it.
    """
    spec = get_train_spec(name)
    if spec.build_optimizers_fn is original_of(titan_optimizer, "build_optimizers"):
        return dataclasses.replace(spec, build_optimizers_fn=titan_optimizer.build_optimizers)
    return spec


def _warn_of_unused_variables() -> None:
    """Log variables that are set but have no effect without the feature "signals"."""
    unused = [name for name in interruption.VARIABLES if os.environ.get(name)]
    if unused and not features.is_installed("signals"):
        log_on_rank_0(
            logging.WARNING,
            f"Without {features.Feature.variable('signals')}=1 these variables have no effect: {', '.join(unused)}.",
        )
