"""Private torchtitan names that this package uses, and the supported torchtitan versions."""

import re
from importlib import import_module, metadata
from typing import Any

SUPPORTED = "0.2.2 or later, before 0.3"
_FIRST, _BEYOND = (0, 2, 2), (0, 3, 0)

ATTRIBUTES = {
    "torchtitan.components.checkpoint:CheckpointManager._async_wait": "waiting for a running async save",
    "torchtitan.components.checkpoint:CheckpointManager._find_load_step": "the step from which a run resumes",
    "torchtitan.components.checkpoint:CheckpointManager._should_save": "whether a step is saved",
    "torchtitan.components.optimizer:OptimizersContainer._post_init": "AdamMini in torchtitan's container",
    "torchtitan.components.optimizer:OptimizersContainer._validate_length": "AdamMini in torchtitan's container",
    "torchtitan.protocols.model_converter:_registry_model_converter_cls": "names of converters in a configuration",
}
"""Private names of torchtitan that this package uses: "module:name" -> purpose."""


def check_version() -> None:
    """Raise ImportError if the installed torchtitan version is not supported.

    A checkout that was never installed has no version; it is then only checked for missing names.
    """
    version = _version()
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers and not _FIRST <= tuple(int(part or 0) for part in numbers.groups()) < _BEYOND:
        raise ImportError(f"torchtitan {version} is installed, but titan_adam_mini.titan supports {SUPPORTED}")


def unsupported(missing: str) -> ImportError:
    """The error for a torchtitan that lacks a name."""
    return ImportError(
        f"{missing}: torchtitan {_version() or 'of unknown version'} is installed, but titan_adam_mini.titan supports "
        f"{SUPPORTED}"
    )


def attribute(owner: Any, name: str) -> Any:
    """``owner.name`` of torchtitan. Raises ImportError, with the versions, if it is missing."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise unsupported(f"{owner.__name__} has no {name}") from None


def model_converters() -> dict[str, type]:
    """torchtitan's registered converters: name in ``[model] converters`` -> class."""
    known: dict[str, type] = attribute(
        import_module("torchtitan.protocols.model_converter"), "_registry_model_converter_cls"
    )
    return known


def _version() -> str:
    try:
        return metadata.version("torchtitan")
    except metadata.PackageNotFoundError:
        return ""
